"""As much of an ONNX model as a change of its nodes takes; everything else is carried through as it is.

Names and numbers are those of onnx/onnx.proto (Apache-2.0).
"""

from __future__ import annotations

from serving.protobuf.tables import message_classes

TABLE = {
    "Model": "graph:Graph=7",
    "Graph": "node:Node*=1 name:string=2 initializer:Tensor*=5 input:Value*=11 output:Value*=12 value_info:Value*=13",
    "Node": "input:string*=1 output:string*=2 name:string=3 op_type:string=4 attribute:Attribute*=5",
    "Attribute": "name:string=1 g:Graph=6 type:int32=20",
    "IntAttribute": "name:string=1 i:int64=3 type:int32=20",
    "Tensor": "dims:int64*=1 data_type:int32=2 name:string=8 raw_data:bytes=9",
    "Value": "name:string=1 type:Type=2",
    "Type": "tensor_type:TensorType=1",
    "TensorType": "elem_type:int32=1 shape:Shape=2",
    "Shape": "dim:Dim*=1",
    "Dim": "dim_value:int64=1| dim_param:string=2|",
}
MESSAGES = message_classes("gpt2_bundle.onnx_model", TABLE)
FLOAT, INT8, INT32, INT64 = 1, 3, 6, 7
"""TensorProto's numbers of the types."""
BRANCH = 5
"""AttributeProto's number of an attribute that is a graph."""
