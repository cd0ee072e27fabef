"""Work and bytes beside the model's own matrices, counted one by one."""

from __future__ import annotations

import pytest

from benchmarks.suite.figures.roofline import bound_seconds, prompt_flops, token_flops
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


def test_the_floor_is_the_longer_of_reading_and_arithmetic():
    assert bound_seconds(100, 10, "fp32", 5, 20) == 5 and bound_seconds(10, 10, "fp32", 5, 20) == 2
    assert bound_seconds(100, 10, "int8", 5, 20) == bound_seconds(100, 10, "fp32", 5, None) == 2
