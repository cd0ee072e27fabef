"""A SavedModel's graph as messages, read without TensorFlow and without running anything.

Names and numbers are those of tensorflow/core/protobuf/{saved_model,meta_graph,saver,saved_object_graph}.proto and
tensorflow/core/framework/{graph,node_def,attr_value,function,op_def}.proto (Apache-2.0). Only the fields that say what
a graph calls are here; tensors and shapes are skipped.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

from serving.errors import BundleError, InputError
from serving.protobuf.tables import message_classes, read_message

FILE = "saved_model.pb"
# Weights are not in it: a graph has 0.3 MB a layer, 15 MB for GPT-2 XL. Parsed it takes up to 45 times as much memory,
# where somebody made it of empty parts.
MAX_BYTES = 64 << 20

TABLE = {
    "SavedModel": "meta_graphs:MetaGraphDef*=2",
    "MetaGraphDef": (
        "meta_info_def:MetaInfoDef=1 graph_def:GraphDef=2 saver_def:SaverDef=3 collection_def:map<CollectionDef>=4"
        " signature_def:map<SignatureDef>=5 asset_file_def:AssetFileDef*=6 object_graph_def:SavedObjectGraph=7"
    ),
    "MetaInfoDef": "tags:string*=4",
    "AssetFileDef": "filename:string=2",
    "SaverDef": "filename_tensor_name:string=1 save_tensor_name:string=2 restore_op_name:string=3",
    "CollectionDef": "node_list:NodeList=1 any_list:AnyList=5",
    "NodeList": "value:string*=1",
    "AnyList": "value:Any*=1",
    "SignatureDef": "inputs:map<TensorInfo>=1 outputs:map<TensorInfo>=2",
    "TensorInfo": "name:string=1",
    "GraphDef": "node:NodeDef*=1 library:FunctionDefLibrary=2",
    "NodeDef": "name:string=1 op:string=2 input:string*=3 attr:map<AttrValue>=5",
    "AttrValue": "list:ListValue=1 func:NameAttrList=10",
    "ListValue": "func:NameAttrList*=9",
    "NameAttrList": "name:string=1 attr:map<AttrValue>=2",
    "FunctionDefLibrary": "function:FunctionDef*=1 gradient:GradientDef*=2",
    "GradientDef": "function_name:string=1 gradient_func:string=2",
    "FunctionDef": "signature:OpDef=1 node_def:NodeDef*=3",
    "OpDef": "name:string=1 input_arg:ArgDef*=2",
    "ArgDef": "name:string=1",
    "SavedObjectGraph": "nodes:SavedObject*=1 concrete_functions:map<SavedConcreteFunction>=2",
    "SavedConcreteFunction": "bound_inputs:int32*=2",
    "SavedObject": (
        "user_object:SavedUserObject=4 asset:SavedAsset=5 registered_name:string=13 registered_saver:string=16"
    ),
    "SavedUserObject": "identifier:string=1",
    "SavedAsset": "asset_file_def_index:int32=1",
}
MESSAGES = message_classes("gpt2_bundle.saved_model", TABLE)


def read_saved_model(version: Path) -> Any:
    """The SavedModel of the folder `version`; None for one of over MAX_BYTES. Raises BundleError for what is none."""
    path = version / FILE
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BundleError(f"{path}: not a plain file; put a copy of the SavedModel there")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise BundleError(f"{path}: there is no such file; export the SavedModel again") from None
    if len(data) > MAX_BYTES:
        return None
    saved = MESSAGES["SavedModel"]()
    try:
        read_message(data, saved)
    except InputError:
        raise BundleError(f"{path}: not a SavedModel; export it again") from None
    return saved
