"""Graphs that take several steps without the host: an optimized graph with the choice of the token, fed back to itself.

Each is a variant's `model.onnx` with nodes after the logits that choose the next token (`greedy`, or `sample` as in
`ort/choose`), keep it, and advance position and attention mask; it reads the same data file. What a step leaves is the
next step's input, so both may be bound to one memory. No step depends on a size that grows, and no number goes from
the host to the device, so that it can be captured as a CUDA graph: the mask is as wide as the cache, and the place of
a row's newest token is an input.

Memory that is read and written in one run needs an order that ONNX Runtime does not know of. Everything that is
written here depends on the token, and so comes after all that reads the old values: mask and position by the step
itself, the history by the comparison that writes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from builder.onnx_export.graph_builder import GraphBuilder
from builder.onnx_export.sampling_graph import add_sampling
from serving.sampling.parameters import ROW_DTYPES

KINDS = ("greedy", "sample")
# Among how many tokens a sampled one is looked for; where a row needs more it is not exact.
CANDIDATES = 256


def write_loops(model: onnx.ModelProto, folder: Path, vocab_size: int) -> None:
    """Write greedy.onnx and sample.onnx next to the model.onnx in `folder` that `model` is."""
    for kind in KINDS:
        path = folder / f"{kind}.onnx"
        path.write_bytes(loop_model(model, kind, vocab_size).SerializeToString())
        onnx.checker.check_model(str(path))


def loop_model(model: onnx.ModelProto, kind: str, vocab_size: int) -> onnx.ModelProto:
    """`model` with the loop's nodes for `kind`; docs/format.md says what goes in and out."""
    loop = onnx.ModelProto()
    loop.CopyFrom(model)
    graph = loop.graph
    b = GraphBuilder("loop_")
    _attend_in_half(graph)
    _take_newest(graph)
    column = b.constant([1], np.int64)
    logits = b.node("Squeeze", "logits", column)
    last = b.node("ReduceMax", "position_ids", column, keepdims=1)
    place = b.node("Sub", last, "start")
    token, exact = _greedy(b, logits) if kind == "greedy" else _sampled(b, logits, place, vocab_size)
    b.name(token, "next_input_ids")

    # A token that is not exact is kept as -1 - token.
    negative = b.node("Sub", b.constant(-1, np.int64), token)
    kept = b.node("Where", exact, token, negative)
    written = b.node("Where", b.node("Equal", "slots", place), kept, "tokens")
    b.name(written, "next_tokens")
    # Always 1, but not before the token is kept.
    largest = b.node("ReduceMax", written, column, keepdims=1)
    increment = b.node("Cast", b.node("Less", largest, b.constant(vocab_size, np.int64)), to=TensorProto.INT64)
    position = b.node("Add", last, increment)
    b.name(position, "next_position_ids")
    seen = b.node("LessOrEqual", "columns", position)
    b.name(b.node("Cast", seen, to=TensorProto.INT64), "next_attention_mask")

    graph.node.extend(b.nodes)
    graph.initializer.extend(b.constants.values())
    graph.input.extend(_values(_INPUTS + (_SAMPLE_INPUTS if kind == "sample" else ())))
    graph.output.extend(_values(_OUTPUTS))
    return loop


def _greedy(b: GraphBuilder, logits: str) -> tuple[str, str]:
    """The likeliest token, the lower id among equals, and whether its logit is a finite number; both [batch, 1]."""
    value, token = b.node("TopK", logits, b.constant([1], np.int64), outputs=2, axis=1, largest=1, sorted=1)
    # Infinities and not-a-number give not-a-number, which equals nothing.
    return token, b.node("Equal", b.node("Sub", value, value), b.constant(0, np.float32))


def _sampled(b: GraphBuilder, logits: str, place: str, vocab_size: int) -> tuple[str, str]:
    count = min(CANDIDATES, vocab_size)
    candidates = b.constant([count], np.int64, "candidates")
    places = b.constant(np.arange(count), np.int64, "places")
    draw = b.node("GatherElements", "draws", place, axis=1)
    chosen = add_sampling(b, logits, draw, candidates, places, vocab_size)
    return chosen.token, chosen.exact


def _attend_in_half(graph: Any) -> None:
    """Make attention and caches 16-bit where they are not: ONNX Runtime has no other GroupQueryAttention on CUDA."""
    nodes = list(graph.node)
    attention = [node for node in nodes if node.op_type == "GroupQueryAttention"]
    caches = {name for node in attention for name in (*node.input[3:5], *node.output[1:3])}
    floats = {value.name for value in graph.input if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    if not floats & caches:
        return
    del graph.node[:]
    for node in nodes:
        if node.op_type != "GroupQueryAttention":
            graph.node.append(node)
            continue
        query, context = node.input[0], node.output[0]
        graph.node.append(_cast(query, f"{context}_query", TensorProto.FLOAT16))
        node.input[0], node.output[0] = f"{context}_query", f"{context}_half"
        graph.node.append(node)
        graph.node.append(_cast(f"{context}_half", context, TensorProto.FLOAT))
    for value in [*graph.input, *graph.output, *graph.value_info]:
        if value.name in caches:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16


def _cast(name: str, output: str, to: int) -> Any:
    return helper.make_node("Cast", [name], [output], name=output, to=to)


def _take_newest(graph: Any) -> None:
    """Take the place of each row's newest token from the input `newest` instead of from the inputs' shapes.

    The shapes are the host's; on a device they would have to be copied there in every step.
    """
    for gather in (node for node in graph.node if node.op_type == "GatherND"):
        gather.input[1] = "newest"
    nodes = list(graph.node)
    while True:
        used = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
        kept = [node for node in nodes if used.intersection(node.output)]
        if len(kept) == len(nodes):
            break
        nodes = kept
    del graph.node[:]
    graph.node.extend(nodes)
    unused = [each for each in graph.initializer if each.name not in used]
    for each in unused:
        graph.initializer.remove(each)


_INT, _FLOAT = TensorProto.INT64, TensorProto.FLOAT
_INPUTS: tuple[tuple[str, int, list[Any]], ...] = (
    ("newest", _INT, ["batch_size", 1]),
    ("start", _INT, ["batch_size", 1]),
    ("columns", _INT, ["total_sequence_length"]),
    ("slots", _INT, ["steps"]),
    ("tokens", _INT, ["batch_size", "steps"]),
)
_SAMPLE_INPUTS: tuple[tuple[str, int, list[Any]], ...] = (
    ("draws", _FLOAT, ["batch_size", "steps"]),
    *((name, _INT if dtype is np.int64 else _FLOAT, ["batch_size"]) for name, dtype in ROW_DTYPES.items()),
)
_OUTPUTS: tuple[tuple[str, int, list[Any]], ...] = (
    ("next_input_ids", _INT, ["batch_size", 1]),
    ("next_position_ids", _INT, ["batch_size", 1]),
    ("next_attention_mask", _INT, ["batch_size", "total_sequence_length"]),
    ("next_tokens", _INT, ["batch_size", "steps"]),
)


def _values(specs: tuple[tuple[str, int, list[Any]], ...]) -> list[Any]:
    return [helper.make_tensor_value_info(*spec) for spec in specs]
