"""Quantised weights: what they stand for, and how far that is from what they were."""

from __future__ import annotations

import numpy as np
import pytest

from builder.quantise import BLOCK, INT8_LARGEST, int4_by_block, int8_by_axis
from tests.unpack import unpack_int4


def matrix(inputs: int, outputs: int) -> np.ndarray:
    values = np.random.default_rng(3).standard_normal((inputs, outputs)).astype(np.float32)
    values[:, 1] = 0
    values[:, 2] *= 1000
    return values


@pytest.mark.parametrize("axis", [0, 1])
def test_int8_is_half_a_step_off_at_most(axis: int) -> None:
    values = matrix(40, 30)
    quantised, scales = int8_by_axis(values, axis)
    assert quantised.dtype == np.int8 and scales.shape == (values.shape[1 - axis],)
    by_line = np.expand_dims(scales, axis)
    assert (np.abs(quantised * by_line - values) <= by_line * 0.5001).all()
    assert (np.abs(quantised).max(axis)[values.any(axis)] == INT8_LARGEST).all()


def test_two_products_fit_in_16_bits() -> None:
    """What processors without VNNI add up before they widen; with more they would give other numbers than the rest."""
    assert 2 * 255 * INT8_LARGEST < 2**15


@pytest.mark.parametrize("inputs", [BLOCK, 3 * BLOCK, 50])
def test_int4_is_a_step_off_at_most_and_keeps_each_blocks_largest(inputs: int) -> None:
    values = matrix(inputs, 30)
    packed, scales = int4_by_block(values)
    blocks = -(-inputs // BLOCK)
    assert packed.shape == (30, blocks, BLOCK // 2) and scales.shape == (30, blocks)
    error = np.abs(unpack_int4(packed, scales, inputs) - values)
    steps = np.repeat(np.abs(scales), BLOCK, axis=1)[:, :inputs].T
    assert (error <= steps * 1.001).all()
    for start in range(0, inputs, BLOCK):
        block, off = values[start : start + BLOCK], error[start : start + BLOCK]
        largest = np.abs(block).argmax(0)[None]
        assert np.take_along_axis(off, largest, 0).max() < 1e-3
    # Half a step for all but those at the short end.
    assert (error <= steps * 0.5001).mean() > 0.95


def test_int4_takes_the_end_with_the_smaller_error() -> None:
    one_sided = np.linspace(0, 1, BLOCK, dtype=np.float32)[:, None]
    both = np.concatenate([one_sided, -one_sided], axis=1)
    _, scales = int4_by_block(np.concatenate([both, np.where(both == 1, 1, -both)], axis=1))
    assert (np.abs(scales) == np.float32(1 / 8)).any() and (scales < 0).any() and (scales > 0).any()
