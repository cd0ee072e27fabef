"""What stock TensorFlow Serving cannot run or merge, found in a SavedModel without running it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from builder.keras_backend import tf

PYTHON = ("PyFunc", "PyFuncStateless", "EagerPyFunc")
# Signatures that a SavedModel keeps for its loader.
_INTERNAL = ("__saved_model_init_op", "__saved_model_train_op")
# What the server links in addition to core TensorFlow (tensorflow/serving, tensorflow_serving/model_servers/BUILD,
# SUPPORTED_TENSORFLOW_OPS): tensorflow-text's ops_lib, by its REGISTER_OP calls and the kOpName of its shims (and
# names that begin with "TFText>"), and the inference ops of TensorFlow Decision Forests. Read in July 2026.
# fmt: off
_LINKED = {
    "tensorflow-text": frozenset((
        "CaseFoldUTF8", "ConstrainedSequence", "FastBertNormalize", "FastWordpieceTokenizeWithOffsets",
        "FindSourceOffsets", "MaxSpanningTree", "NormalizeUTF8", "NormalizeUTF8WithOffsetsMap", "PhraseTokenize",
        "RegexSplitWithOffsets", "RougeL", "SentenceFragments", "SentenceFragmentsV2", "SentencepieceDetokenizeOp",
        "SentencepieceIdToStringOp", "SentencepieceOp", "SentencepieceStringToIdOp", "SentencepieceTokenizeOp",
        "SentencepieceTokenizeWithOffsetsOp", "SentencepieceVocabSizeOp", "SplitMergeTokenizeWithOffsets",
        "TokenizerFromLogits", "UnicodeScriptTokenizeWithOffsets", "WhitespaceTokenizeWithOffsets",
        "WordpieceTokenizeWithOffsets",
    )),
    "TensorFlow Decision Forests": frozenset((
        "SimpleMLCreateModelResource", "SimpleMLInferenceLeafIndexOpWithHandle", "SimpleMLInferenceOp",
        "SimpleMLInferenceOpWithHandle", "SimpleMLLoadModelFromPath", "SimpleMLLoadModelFromPathWithHandle",
    )),
}
# fmt: on
# What Keras and tf.function call a tensor that nobody named.
_MADE_UP = re.compile(r"(args?|inputs?|outputs?|keras_tensor)_\d+")


@dataclass(frozen=True)
class Finding:
    """One thing that lint has to say. Errors fail a build; warnings and notes do not."""

    level: Literal["error", "warning", "note"]
    check: str
    where: str
    message: str


def check_ops(meta_graph: Any) -> Iterator[Finding]:
    """Findings on the ops that a session can reach: those of the graph and of every function called from it."""
    from tensorflow.python.framework import op_def_registry

    functions = {function.signature.name: function for function in meta_graph.graph_def.library.function}
    seen: set[tuple[str, str]] = set()
    for where, node in _reachable(meta_graph.graph_def, functions):
        kind = "_XlaMustCompile" if node.attr["_XlaMustCompile"].b else node.op
        if (where, kind) in seen or node.op in functions:
            continue
        seen.add((where, kind))
        if node.op in PYTHON:
            yield Finding(
                "error", "ops", where, f"{node.op} calls Python, which the server has not; use TensorFlow ops"
            )
        elif kind == "_XlaMustCompile":
            yield _xla(where, "jit_compile=True")
        elif node.op.startswith("Xla"):
            yield _xla(where, node.op)
        elif library := _linked(node.op):
            yield Finding("note", "ops", where, f"{node.op} is of {library}, which stock TensorFlow Serving links")
        elif op_def_registry.get(node.op) is None:
            yield Finding("error", "ops", where, f"{node.op} is not a core TensorFlow op; the stock server lacks it")
        device = node.device.lower()
        if "/device:" in device and "/device:cpu" not in device and ("graph", node.device) not in seen:
            seen.add(("graph", node.device))
            yield Finding("warning", "ops", where, f"placed on {node.device}; a server without it cannot run the model")
    for name in {name for name, _ in _reachable(meta_graph.graph_def, functions)} & functions.keys():
        if functions[name].attr["_XlaMustCompile"].b and (name, "_XlaMustCompile") not in seen:
            yield _xla(name, "jit_compile=True")


def _linked(op: str) -> str | None:
    """The library other than core TensorFlow from which the server has `op`."""
    if op.startswith("TFText>"):
        return "tensorflow-text"
    return next((library for library, ops in _LINKED.items() if op in ops), None)


def _xla(where: str, what: str) -> Finding:
    return Finding(
        "error", "ops", where, f"{what} needs XLA, which the server compiles only with flags; export without"
    )


def reached_functions(meta_graph: Any) -> set[str]:
    """Names of the functions that a session can reach."""
    functions = {function.signature.name: function for function in meta_graph.graph_def.library.function}
    return {where for where, _ in _reachable(meta_graph.graph_def, functions)} - {"graph"}


def _reachable(graph: Any, functions: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(place, node) of every node of the graph and of the functions that it leads to; each function once."""
    pending: list[tuple[str, Any]] = [("graph", graph.node)]
    entered: set[str] = set()
    while pending:
        where, nodes = pending.pop()
        for node in nodes:
            yield where, node
            called = {node.op}
            for value in node.attr.values():
                called |= {value.func.name, *(item.name for item in value.list.func)}
            for name in (called & functions.keys()) - entered:
                entered.add(name)
                pending.append((name, functions[name].node_def))


def check_signatures(meta_graph: Any) -> Iterator[Finding]:
    """Findings on names and shapes of the signatures' tensors."""
    definitions = {key: value for key, value in meta_graph.signature_def.items() if key not in _INTERNAL}
    if not definitions:
        yield Finding("error", "signatures", "model", "no signatures; save it with signatures={'serving_default': ...}")
    elif "serving_default" not in definitions:
        yield Finding("warning", "signatures", "model", "no serving_default; every request has to name a signature")
    for key, definition in sorted(definitions.items()):
        if not key.strip():
            yield Finding("error", "signatures", "model", "a signature without a name; no request can reach it")
        if not definition.outputs:
            yield Finding("error", "signatures", key, "no outputs; the server refuses to run it")
        for side, tensors in (("input", definition.inputs), ("output", definition.outputs)):
            for name, tensor in sorted(tensors.items()):
                yield from _check_tensor(f"{key}.{name}", side, name, tensor)
        yield from _check_padding(key, definition.inputs)


def _check_tensor(where: str, side: str, name: str, tensor: Any) -> Iterator[Finding]:
    if not name.strip():
        yield Finding("error", "signatures", where, f"an {side} without a name; no client can say it")
    elif _MADE_UP.fullmatch(name):
        yield Finding("warning", "signatures", where, f"nobody named this {side}; give its TensorSpec or result a name")
    shape = tensor.tensor_shape
    if shape.unknown_rank:
        yield Finding("error", "shapes", where, f"{side} of unknown rank; a client cannot know how to fill it")
    elif not shape.dim:
        yield Finding("error", "shapes", where, f"{side} is a scalar; without a batch axis requests cannot be merged")
    elif shape.dim[0].size != -1:
        size = shape.dim[0].size
        yield Finding("error", "shapes", where, f"first axis of this {side} is fixed at {size}; it must be the batch")


def _check_padding(key: str, inputs: Any) -> Iterator[Finding]:
    """Ragged inputs are padded when requests are merged: something must say where each row ends."""
    shapes = {name: [dim.size for dim in tensor.tensor_shape.dim] for name, tensor in inputs.items()}
    ragged = [name for name, shape in shapes.items() if -1 in shape[1:]]
    lengths = [
        name for name, shape in shapes.items()
        if re.search("len|mask|size|count", name.lower()) and (len(shape) == 1 or name in ragged)
    ]  # fmt: skip
    for name in sorted(set(ragged) - set(lengths)):
        if lengths:
            continue
        tokens = len(shapes[name]) == 2 and tf.as_dtype(inputs[name].dtype).is_integer
        message = "rows of free length and no input of lengths or a mask; padding to merge requests changes the answers"
        yield Finding("error" if tokens else "warning", "padding", f"{key}.{name}", message)
