"""The graph that chooses the next token where the logits are: `serving.sampling` once more, in standard ONNX operators.

It has no weights and serves every precision. Exponentials and sums differ between runtimes in their last bits, so a
row whose draw lies so near a border that those could decide is flagged as not exact, as is one whose draw may lie
after the candidates. The caller then takes that row's logits and chooses on the host. A row that is flagged as exact
has the host's token.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from builder.onnx_export.graph_builder import GraphBuilder
from serving.sampling.parameters import ROW_DTYPES

OPSET = 18
IR_VERSION = 10
# Of the mass: what two correct computations of a running sum may differ by. A float32 exponential errs by less than 3
# roundings (2^-24 each), its rounded argument v by |v| of them, which over a whole vocabulary comes to less than 12 of
# the mass; that twice, for both sides, and as much again.
MARGIN = 2.0**-17


def sampling_model(vocab_size: int) -> onnx.ModelProto:
    """The graph for logits of `vocab_size`; docs/format.md says what goes in and out."""
    b = GraphBuilder()
    one = b.constant([1], np.int64)
    # The logits, edited in the few places that have an edit.
    flat = b.node("Squeeze", "logits", one)
    edited = b.node("Add", b.node("GatherElements", flat, "edit_ids", axis=1), "edit_bias")
    positive = b.node("Greater", edited, b.constant(0, np.float32))
    shrunk, grown = b.node("Div", edited, "edit_repetition"), b.node("Mul", edited, "edit_repetition")
    edited = b.node("Sub", b.node("Where", positive, shrunk, grown), "edit_penalty")
    logits = b.node("ScatterElements", flat, "edit_ids", edited, axis=1)
    places = b.node("Range", b.constant(0, np.int64), b.node("Squeeze", "candidates"), b.constant(1, np.int64))
    draw = b.node("Unsqueeze", "draw", one)
    chosen = add_sampling(b, logits, draw, "candidates", places, vocab_size)
    b.name(chosen.token, "token")
    b.name(b.node("Squeeze", chosen.exact, one), "exact")
    b.name(chosen.values, "candidate_logits")
    b.name(chosen.ids, "candidate_ids")
    normaliser = b.node("Log", b.node("Squeeze", chosen.everything, one))
    b.name(b.node("Cast", normaliser, to=TensorProto.FLOAT), "normaliser")
    graph = helper.make_graph(b.nodes, "choose", _inputs(vocab_size), _outputs(), list(b.constants.values()))
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="gpt2-bundle")
    onnx.checker.check_model(model, full_check=True)
    return model


@dataclass(frozen=True)
class SampledToken:
    """Names of what `add_sampling` computes, [batch, 1] but for `values` and `ids`, [batch, candidates]."""

    token: str
    exact: str
    values: str
    ids: str
    everything: str


def add_sampling(
    b: GraphBuilder, logits: str, draw: str, candidates: str, places: str, vocab_size: int
) -> SampledToken:
    """Add the choice among the `candidates` ([1] int64) likeliest of `logits` [batch, vocab_size].

    `draw` is [batch, 1], `places` the numbers from 0 to candidates - 1; the arrays of SamplingRows are the graph's
    inputs of their names, [batch].

    The bounds, in units of the likeliest token's weight, C candidates, c their running sums, M the mass of all tokens
    that top-k leaves, m = MARGIN * M:

    - the last kept sum lies between those of the tokens that are surely and that are possibly kept. Where the nucleus
      ends after the candidates it lies between top_p * M, which it reaches, and the last candidate's weight above it;
    - the draw times either bound, less or plus m, falls on one and the same candidate, or the row is not exact.
    """
    one, minus_one = b.constant([1], np.int64), b.constant([-1], np.int64)
    f64 = TensorProto.DOUBLE

    def column(name: str) -> str:
        return str(b.node("Unsqueeze", name, one))

    def count(flags: str) -> str:
        return str(b.node("ReduceSum", b.node("Cast", flags, to=TensorProto.INT64), minus_one, keepdims=1))

    # Candidates in descending order, and the weights of all tokens relative to the first.
    values, ids = b.node("TopK", logits, candidates, outputs=2, axis=1, largest=1, sorted=1)
    first = b.node("Slice", values, b.constant([0], np.int64), one, one)
    temperature, top_k = column("temperature"), column("top_k")
    zero_temperature = b.node("Equal", temperature, b.constant(0, np.float32))
    greedy = b.node("Or", zero_temperature, b.node("Equal", top_k, one))
    divisor = b.node("Where", zero_temperature, b.constant(1, np.float32), temperature)

    def weights(some: str) -> str:
        return str(b.node("Exp", b.node("Div", b.node("Sub", some, first), divisor)))

    everything = b.node("ReduceSum", b.node("Cast", weights(logits), to=f64), minus_one, keepdims=1)
    size = b.constant([[vocab_size]], np.int64)
    limited = b.node("And", b.node("Greater", top_k, b.constant([[0]], np.int64)), b.node("Less", top_k, size))
    kept_places = b.node("Where", limited, top_k, size)
    possible = b.node("Less", places, kept_places)
    weight = b.node("Cast", b.node("Mul", weights(values), b.node("Cast", possible, to=TensorProto.FLOAT)), to=f64)
    axis = b.constant(1, np.int64)
    sums, before = b.node("CumSum", weight, axis), b.node("CumSum", weight, axis, exclusive=1)
    last_sum = b.node("Slice", sums, minus_one, b.constant([2**31 - 1], np.int64), one)
    last_weight = b.node("Slice", weight, minus_one, b.constant([2**31 - 1], np.int64), one)

    # Whether no kept token is after the candidates because of top-k, and the mass that top-k leaves.
    complete = b.node("LessOrEqual", kept_places, candidates)
    decidable = b.node("Or", complete, b.node("Not", limited))
    mass = b.node("Where", complete, last_sum, everything)
    margin = b.node("Mul", mass, b.constant(MARGIN, np.float64))
    reach = b.node("Mul", b.node("Cast", column("top_p"), to=f64), mass)
    min_p = b.node("Cast", column("min_p"), to=f64)

    def kept(reached: str, share: float) -> tuple[str, str]:
        """How many candidates are kept if the nucleus ends at `reached` and min-p is off by `share`; their sum."""
        likely = b.node("GreaterOrEqual", weight, b.node("Mul", min_p, b.constant(share, np.float64)))
        inside = b.node("And", b.node("And", b.node("Less", before, reached), likely), possible)
        number = b.node("Max", count(inside), one)
        return number, str(b.node("GatherElements", sums, b.node("Sub", number, one), axis=1))

    surely, low = kept(b.node("Sub", reach, margin), 1 + MARGIN)
    perhaps, high = kept(b.node("Add", reach, margin), 1 - MARGIN)
    no_min_p = b.node("Equal", min_p, b.constant(0, np.float64))
    open_end = b.node("Not", complete)
    runs_on = b.node("And", b.node("And", open_end, no_min_p), b.node("Equal", surely, candidates))
    low = b.node("Where", runs_on, b.node("Max", low, reach), low)
    may_run_on = b.node("And", open_end, b.node("Equal", perhaps, candidates))
    behind = b.node("Max", high, b.node("Min", mass, b.node("Add", reach, last_weight)))
    high = b.node("Where", may_run_on, behind, high)

    draw = b.node("Cast", draw, to=f64)
    target_low = b.node("Sub", b.node("Mul", draw, b.node("Sub", low, margin)), margin)
    target_high = b.node("Add", b.node("Mul", draw, b.node("Add", high, margin)), margin)
    index = count(b.node("LessOrEqual", sums, target_low))
    other = count(b.node("LessOrEqual", sums, target_high))
    found = b.node("And", b.node("Equal", index, other), b.node("Less", other, candidates))
    # The greatest logit's own weight is 1; less, or not-a-number, means that there is no finite greatest one.
    finite = b.node("GreaterOrEqual", everything, b.constant(1, np.float64))
    exact = b.node("And", finite, b.node("Or", greedy, b.node("And", decidable, found)))
    index = b.node("Where", b.node("And", exact, b.node("Not", greedy)), index, b.constant([[0]], np.int64))

    return SampledToken(b.node("GatherElements", ids, index, axis=1), exact, values, ids, everything)


def _inputs(vocab_size: int) -> list[Any]:
    batch, edits = "batch_size", "edits"
    float_rows = (*(name for name, dtype in ROW_DTYPES.items() if dtype is np.float32), "draw")
    integer_rows = (name for name, dtype in ROW_DTYPES.items() if dtype is np.int64)
    return [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 1, vocab_size]),
        *(helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch]) for name in float_rows),
        *(helper.make_tensor_value_info(name, TensorProto.INT64, [batch]) for name in integer_rows),
        helper.make_tensor_value_info("edit_ids", TensorProto.INT64, [batch, edits]),
        *(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, edits])
            for name in ("edit_bias", "edit_repetition", "edit_penalty")
        ),
        helper.make_tensor_value_info("candidates", TensorProto.INT64, [1]),
    ]


def _outputs() -> list[Any]:
    batch, some = "batch_size", "candidates"
    return [
        helper.make_tensor_value_info("token", TensorProto.INT64, [batch, 1]),
        helper.make_tensor_value_info("exact", TensorProto.BOOL, [batch]),
        helper.make_tensor_value_info("candidate_logits", TensorProto.FLOAT, [batch, some]),
        helper.make_tensor_value_info("candidate_ids", TensorProto.INT64, [batch, some]),
        helper.make_tensor_value_info("normaliser", TensorProto.FLOAT, [batch]),
    ]


def write_sampling_graph(vocab_size: int, path: Path) -> onnx.ModelProto:
    """Write the graph to `path` and return it."""
    model = sampling_model(vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return model
