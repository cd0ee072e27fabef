"""Work and bytes beside the model's own matrices, counted one by one; and what a repeat attained."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks.suite.figures.roofline import attained, bound_seconds, prompt_flops, step_bytes, together, token_flops
from benchmarks.suite.load.events import Response
from serving.bundle import Geometry

GEOMETRY = Geometry(
    vocab_size=50, n_positions=32, n_embd=8, n_layer=3, n_head=2, n_inner=24, layer_norm_epsilon=1e-5,
    activation_function="gelu_new", bos_token_id=0, eos_token_id=0,
)  # fmt: skip


def test_flops_are_two_for_each_weight_and_each_pair_of_positions():
    shapes = [(8, 24), (8, 8), (8, 24), (24, 8)] * 3
    matrices = 2 * sum(rows * columns for rows, columns in shapes)
    # For a position: 8 products with the query and 8 with the weight, in each of 3 layers.
    assert token_flops(GEOMETRY, 10, with_head=False) == matrices + 2 * 3 * 10 * 16
    assert token_flops(GEOMETRY, 10) == matrices + 2 * 3 * 10 * 16 + 2 * 50 * 8
    tokens = [token_flops(GEOMETRY, position, with_head=False) for position in (1, 2, 3, 4)]
    assert prompt_flops(GEOMETRY, 4) == pytest.approx(sum(tokens) + 2 * 50 * 8)


def test_intervals_that_overlap_are_counted_together():
    assert together([]) == (0, 0)
    assert together([(0, 2), (1, 3), (5, 6)]) == (4, pytest.approx(5 / 4))
    random = np.random.default_rng(0)
    intervals = [(first, first + length) for first, length in random.uniform(0, 10, (20, 2))]
    grid = (np.arange(0, 20, 0.001) + 0.0005)[:, None]
    count = ((grid >= [first for first, _ in intervals]) & (grid < [last for _, last in intervals])).sum(axis=1)
    union, rows = together(intervals)
    assert union == pytest.approx((count > 0).sum() * 0.001, rel=0.01)
    assert rows == pytest.approx(count[count > 0].mean(), rel=0.01)


def test_two_at_once_read_the_weights_once():
    """Two requests side by side: prompts of 6 in 1 s, then 4 further tokens in 2 s."""
    one = Response(0, 0.0, 0.0, 3.0, (1.0, 1.5, 2.0, 2.5, 3.0), 6, started=0.0)
    found = attained([one, dataclasses.replace(one, index=1)], GEOMETRY, "fp32")
    cached = 6 + 5 / 2
    assert found["prefill"]["flops_per_second"] == pytest.approx(2 * prompt_flops(GEOMETRY, 6))
    assert found["decode"]["flops_per_second"] == pytest.approx(8 * token_flops(GEOMETRY, cached) / 2)
    assert found["decode"]["rows"] == 2
    # Four steps, each of which reads the weights once and two caches.
    expected = 8 * token_flops(GEOMETRY, cached) / (4 * step_bytes(GEOMETRY, "fp32", 2, cached))
    assert found["decode"]["intensity"] == pytest.approx(expected)
    alone = attained([one], GEOMETRY, "fp32")
    assert alone["decode"]["intensity"] < found["decode"]["intensity"]
    whole = dataclasses.replace(one, streamed=False)
    assert attained([whole], GEOMETRY, "fp32") == attained([], GEOMETRY, "fp32") == {"prefill": None, "decode": None}


def test_the_floor_is_the_longer_of_reading_and_arithmetic():
    assert bound_seconds(100, 10, "fp32", 5, 20) == 5 and bound_seconds(10, 10, "fp32", 5, 20) == 2
    assert bound_seconds(100, 10, "int8", 5, 20) == bound_seconds(100, 10, "fp32", 5, None) == 2
