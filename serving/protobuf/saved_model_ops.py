"""What a SavedModel may hold to be loaded: the ops that this project's exports are made of, and nothing else.

A graph is a program. TensorFlow's ops can read and write any file of the process (ReadFile, WriteFile, SaveV2, the
readers of datasets, a PrintV2 to a file) and call foreign code (PyFunc). So a graph is refused by what it holds before
TensorFlow sees it, whether or not a signature reaches it. ALLOWED_OPS is the one list; the exporter's tests hold every
op that it writes against it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.errors import BundleError
from serving.protobuf.saved_model import FILE, MAX_BYTES, read_saved_model

# fmt: off
ALLOWED_OPS = frozenset((
    # Constants, shapes and types.
    "Bitcast", "BroadcastTo", "Cast", "ConcatV2", "Const", "ExpandDims", "Fill", "Identity", "IdentityN", "OnesLike",
    "Pack", "Pad", "PadV2", "ParseTensor", "Placeholder", "PlaceholderWithDefault", "Range", "Rank", "Reshape",
    "SerializeTensor", "Shape", "Size", "Slice", "Split", "SplitV", "Squeeze", "StopGradient", "StridedSlice", "Tile",
    "Transpose", "Unpack", "ZerosLike",
    # Arithmetic and logic.
    "Abs", "AddN", "AddV2", "All", "Any", "ArgMax", "ArgMin", "BatchMatMulV2", "BiasAdd", "BitwiseAnd", "BitwiseOr",
    "BitwiseXor", "Cumsum", "DenseBincount", "Einsum", "Equal", "Erf", "Exp", "Floor", "FloorDiv", "FloorMod",
    "Greater", "GreaterEqual", "IsFinite", "IsInf", "IsNan", "LeftShift", "Less", "LessEqual", "Log", "LogSoftmax",
    "LogicalAnd", "LogicalNot", "LogicalOr", "MatMul", "Max", "Maximum", "Mean", "Min", "Minimum", "Mul", "Neg",
    "NotEqual", "Pow", "Prod", "RandomUniform", "RandomUniformInt", "RealDiv", "Relu", "RightShift", "Round",
    "Rsqrt", "Select", "SelectV2", "Sign", "Softmax", "SparseSoftmaxCrossEntropyWithLogits", "Sqrt", "Square",
    "SquaredDifference", "Sub", "Sum", "Tanh", "TopKV2",
    # Rows, places and ragged rows.
    "GatherNd", "GatherV2", "InplaceUpdate", "LowerBound", "RaggedGather", "RaggedRange", "RaggedTensorToTensor",
    "ReverseV2", "ScatterNd", "SegmentSum", "SegmentSumV2", "TensorScatterAdd", "TensorScatterUpdate", "Unique",
    "UnsortedSegmentMax", "UnsortedSegmentMin", "UnsortedSegmentSum", "UpperBound", "Where",
    # Text.
    "DecodeRaw", "ReduceJoin", "StaticRegexFullMatch", "StaticRegexReplace", "StringJoin", "StringLength",
    "StringSplitV2", "Substr", "UnicodeDecode", "UnicodeDecodeWithOffsets", "UnicodeEncode", "UnicodeTranscode",
    # Variables, and the order of calls.
    "AssignAddVariableOp", "AssignSubVariableOp", "AssignVariableOp", "ConsumeMutexLock", "DisableCopyOnRead",
    "MutexLock", "MutexV2", "ReadVariableOp", "ResourceGather", "ResourceGatherNd", "ResourceScatterAdd",
    "ResourceScatterMax", "ResourceScatterMin", "ResourceScatterNdUpdate", "ResourceScatterUpdate",
    "ResourceStridedSliceAssign", "Timestamp", "VarHandleOp", "VarIsInitializedOp", "VariableShape",
    # Calls, loops, branches and merged calls.
    "Assert", "BatchFunction", "Case", "If", "NoOp", "PartitionedCall", "StatefulPartitionedCall", "StatelessCase",
    "StatelessIf", "StatelessWhile", "While",
))
# Ops of other people's graphs that read or write files, or run code that is not in the graph. What stands neither here
# nor above is judged by neither list: lint says that it does not run such a graph.
FOREIGN_OPS = re.compile(
    r"PyFunc(Stateless)?|EagerPyFunc|ReadFile|WriteFile|MatchingFiles|PrintV2|ImmutableConst|LoadAndRemapMatrix"
    r"|Save(V2|Slices)?|Restore(V2|Slice)?|MergeV2Checkpoints|ShardedFile(name|spec)|CreateSummaryFileWriter|ImportEvent"
    r"|(TextLine|TFRecord|FixedLengthRecord|WholeFile|LMDB)Reader(V2)?"
    r"|(Experimental)?(TextLine|TFRecord|FixedLengthRecord|CSV|Sql|LMDB|Snapshot|Cache|Load|Save)Dataset(V\d)?"
    r"|(Experimental)?DatasetToTFRecord|Debug(Identity|NanCount|NumericSummary)(V\d)?|RemoteCall"
)
# fmt: on
# Graphs that are looked at, and entries of a list of one: GPT-2 XL's longest has 20,000.
_GRAPHS, _MOST = 4, 1 << 18
_SAVE_OPS = frozenset(("SaveV2", "MergeV2Checkpoints", "ShardedFilename"))
_RESTORE_OPS = frozenset(("RestoreV2",))
_CALLS = frozenset(("PartitionedCall", "StatefulPartitionedCall"))
# Objects that TensorFlow's own loader builds; for another name it looks for a class that some package registered.
_OBJECTS = re.compile(r"_generic_user_object|signature_map|trackable_(list|dict|tuple)_wrapper")
_FILES = re.compile(
    r"saved_model\.pb|fingerprint\.pb|variables/variables\.(index|data-\d{5}-of-\d{5})"
    r"|assets\.extra/tf_serving_warmup_requests"
)
Functions = Mapping[str, Any]


@dataclass(frozen=True)
class Problem:
    """What no export of this project holds: `op`, or "" for what is not an op; the graph or function; a sentence."""

    op: str
    where: str
    message: str


def check_saved_model(version: Path, named: Path | None = None) -> None:
    """Raise BundleError for the first of `find_problems`; nothing of the SavedModel in `version` has run then.

    `named` is what errors say in its place, such as the folder that it is a copy of.
    """
    for problem in find_problems(version):
        raise BundleError(
            f"{named or version}: {problem.where}: {problem.message}; it was not loaded. Export it again, or take it "
            "from somebody whose programs you would run"
        )


def find_problems(version: Path) -> Iterator[Problem]:
    """What the SavedModel in the folder `version` holds beyond what this project's exports do.

    Raises BundleError for what is not a SavedModel.
    """
    yield from _check_files(version)
    saved = read_saved_model(version)
    if saved is None:
        yield Problem("", FILE, f"larger than {MAX_BYTES >> 20} MiB, which no export of this project is")
        return
    if len(saved.meta_graphs) != 1:
        yield Problem("", "model", f"it has {len(saved.meta_graphs)} graphs, where an export has one")
    for meta_graph in saved.meta_graphs[:_GRAPHS]:
        if problem := _too_large(meta_graph):
            yield problem  # What is not a list of an export would take long to look through.
        else:
            yield from _check_meta_graph(meta_graph)


def _too_large(meta_graph: Any) -> Problem | None:
    """The first list that is longer than any of an export."""
    graph, objects = meta_graph.graph_def, meta_graph.object_graph_def.nodes
    lists = [("graph", graph.node), ("functions", graph.library.function), ("objects", objects)]
    lists += [("signatures", meta_graph.signature_def), ("collections", meta_graph.collection_def)]
    for where, items in lists:
        if len(items) > _MOST:
            return Problem("", where, f"there are {len(items):,}, more than any export has")
    for nodes in (graph.node, *(function.node_def for function in graph.library.function)):
        if len(nodes) > _MOST or any(len(node.input) > _MOST or len(node.attr) > _MOST for node in nodes):
            return Problem("", "graph", f"a function or node has over {_MOST:,} parts, more than any export has")
    return None


def _check_files(version: Path) -> Iterator[Problem]:
    """A loader may take other files than the one that is read here: a text form, assets, a model of another kind."""
    for folder, _, names in os.walk(version):
        for name in names:
            path = (Path(folder) / name).relative_to(version).as_posix()
            if not _FILES.fullmatch(path):
                yield Problem("", "files", f"the file {path[:80]!r} is of no kind that an export writes")


def _check_meta_graph(meta_graph: Any) -> Iterator[Problem]:
    graph, saver = meta_graph.graph_def, meta_graph.saver_def
    functions: dict[str, Any] = {}
    for function in graph.library.function:
        if function.signature.name in functions:
            yield Problem("", "graph", f"two functions are called {function.signature.name[:80]!r}")
        functions[function.signature.name] = function
    saves, restores = _node(saver.save_tensor_name), _node(saver.restore_op_name)
    files: dict[str, bool] = {}
    """Functions of the saver's ops, and whether they write."""
    for name, function in functions.items():
        ops = {node.op for node in function.node_def}
        if ops & (_SAVE_OPS | _RESTORE_OPS):
            files[name] = bool(ops & _SAVE_OPS)
        yield from _check_nodes(name, function.node_def, ALLOWED_OPS | _SAVE_OPS | _RESTORE_OPS)
    yield from _check_nodes("graph", graph.node, ALLOWED_OPS)
    if graph.library.gradient:
        yield Problem("", "graph", "it has gradients, which serving does not need")
    yield from _check_saver(graph, functions, files, _node(saver.filename_tensor_name), saves, restores)
    yield from _check_ways_in(meta_graph, files, {saves, restores, _node(saver.filename_tensor_name)} - {""})
    yield from _check_objects(meta_graph)


def _check_nodes(where: str, nodes: Any, allowed: frozenset[str]) -> Iterator[Problem]:
    for node in nodes:
        if node.op not in allowed:
            message = (
                f"the op {node.op[:80]!r} (node {node.name[:80]!r}) is none that an export of this project is made of"
            )
            yield Problem(node.op, where[:80], message)


def _check_saver(
    graph: Any, functions: Functions, files: Mapping[str, bool], filename: str, saves: str, restores: str
) -> Iterator[Problem]:
    """The saver's two functions may be called by its two nodes alone, on the file name that the loader feeds.

    So nothing but a loader's restore reaches them, and it reads the files that the loader names.
    """
    for where, nodes in (("graph", graph.node), *((name, each.node_def) for name, each in functions.items())):
        for node in nodes:
            called = set(_called(node.attr)) & files.keys()
            inputs = {_node(each) for each in node.input}
            if where == "graph" and node.name in {saves, restores} - {""}:
                # A branch or a loop could hand the function another file name than the one that the loader feeds.
                wrong = node.op not in _CALLS or not node.input or node.input[0] not in (filename, f"{filename}:0")
                if wrong or any(files[name] for name in called if node.name == restores):
                    yield Problem(node.op, where, f"the saver's node {node.name[:80]!r} is not as an export writes it")
                inputs.discard(filename)
            elif called:
                message = (
                    f"the node {node.name[:80]!r} calls the saver's function {min(called)[:80]!r}, which opens files"
                )
                yield Problem(node.op, where[:80], message)
            if where == "graph" and inputs & ({saves, restores, filename} - {""}):
                yield Problem(node.op, where, f"the node {node.name[:80]!r} takes what belongs to the saver")
    for name in files:
        first = functions[name].signature.input_arg[0].name if functions[name].signature.input_arg else ""
        for node in functions[name].node_def:
            if node.op in _RESTORE_OPS and (not node.input or node.input[0] != first):
                yield Problem(
                    node.op, name[:80], f"{node.op} (node {node.name[:80]!r}) reads a file of the graph's own choice"
                )


def _check_ways_in(meta_graph: Any, files: Mapping[str, bool], saver: set[str]) -> Iterator[Problem]:
    """Signatures, what runs at loading, and functions that Python may call must not lead to the saver."""
    for key, signature in meta_graph.signature_def.items():
        for tensor in (*signature.inputs.values(), *signature.outputs.values()):
            if _node(tensor.name) in saver:
                yield Problem("", key[:80], f"the signature feeds or fetches {tensor.name[:80]!r}, which opens files")
    for key, collection in meta_graph.collection_def.items():
        if {_node(name) for name in collection.node_list.value} & saver:
            yield Problem("", key[:80], "the collection runs the saver")
    for name in files.keys() & set(meta_graph.object_graph_def.concrete_functions):
        yield Problem("", name[:80], "the saver's function is offered to be called")
    if meta_graph.asset_file_def:
        yield Problem("", "graph", f"it opens the file {meta_graph.asset_file_def[0].filename[:80]!r}")


def _check_objects(meta_graph: Any) -> Iterator[Problem]:
    for item in meta_graph.object_graph_def.nodes:
        kind = item.user_object.identifier
        if item.HasField("asset"):
            yield Problem("", "objects", "an object is a file")
        if item.HasField("user_object") and not _OBJECTS.fullmatch(kind):
            yield Problem(
                "", "objects", f"an object is of the kind {kind[:80]!r}, which some package would have to build"
            )
        if registered := item.registered_name or item.registered_saver:
            yield Problem("", "objects", f"an object is of the class {registered[:80]!r} of some package")


def _called(attributes: Any) -> Iterator[str]:
    """Names of the functions in a node's attributes, and in theirs."""
    for value in attributes.values():
        for function in (value.func, *value.list.func):
            if function.name:
                yield function.name
            if function.attr:
                yield from _called(function.attr)


def _node(tensor: str) -> str:
    """The node of "name:0", "^name" or "name"."""
    return tensor.removeprefix("^").partition(":")[0]
