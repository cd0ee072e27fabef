"""Quantized weights: what they stand for, and how far that is from what they were."""

from __future__ import annotations

import numpy as np
import pytest

from builder.onnx_export.quantization import (
    BLOCK,
    INT8_LARGEST,
    SHRINKINGS,
    _scale,
    _spread,
    int4_by_block,
    int8_by_axis,
)
from tests.unpack import unpack_int4


def matrix(inputs: int, outputs: int) -> np.ndarray:
    values = np.random.default_rng(3).standard_normal((inputs, outputs)).astype(np.float32)
    values[:, 1] = 0
    values[:, 2] *= 1000
    return values


@pytest.mark.parametrize("axis", [0, 1])
def test_int8_is_half_a_step_off_at_most(axis: int) -> None:
    values = matrix(40, 30)
    quantized, scales = int8_by_axis(values, axis)
    assert quantized.dtype == np.int8 and scales.shape == (values.shape[1 - axis],)
    by_line = np.expand_dims(scales, axis)
    assert (np.abs(quantized * by_line - values) <= by_line * 0.5001).all()
    assert (np.abs(quantized).max(axis)[values.any(axis)] == INT8_LARGEST).all()


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


@pytest.mark.parametrize("width", [40, 1100])
def test_the_spread_of_errors_is_the_factor_of_the_inverse(width: int) -> None:
    """Also where the factor is inverted by halves, and past the inputs, where nothing spreads."""
    x = np.random.default_rng(4).standard_normal((2 * width, width)).astype(np.float32)
    moments = x.T @ x / len(x)
    spread = _spread(moments, 0.1, width + 5)
    assert (np.tril(spread, -1) == 0).all() and (spread[:width, width:] == 0).all()
    damped = moments + 0.1 * np.diag(moments).mean() * np.eye(width)
    product = spread[:width, :width].T @ spread[:width, :width] @ damped
    np.testing.assert_allclose(product, np.eye(width), atol=1e-4)


@pytest.mark.parametrize("inputs", [3 * BLOCK, 50])
def test_int4_for_known_inputs_is_nearer_on_them(inputs: int) -> None:
    """Inputs that go together, as a model's do: by the error of the products, which is what the rounding is for."""
    random = np.random.default_rng(5)
    x = (random.standard_normal((500, 8)) @ random.standard_normal((8, inputs))).astype(np.float32)
    x += 0.1 * random.standard_normal(x.shape).astype(np.float32)
    values = random.standard_normal((inputs, 30)).astype(np.float32)

    def error(*moments: np.ndarray) -> float:
        packed, scales = int4_by_block(values, *moments)
        assert packed.shape == (30, -(-inputs // BLOCK), BLOCK // 2)
        return float(((x @ unpack_int4(packed, scales, inputs) - x @ values) ** 2).mean())

    assert error(x.T @ x / len(x)) < 0.3 * error()


def test_a_blocks_scale_is_the_one_of_the_least_error_by_importance() -> None:
    random = np.random.default_rng(6)
    weights = random.standard_normal((BLOCK, 200)).astype(np.float32)
    importance = (random.random((BLOCK, 1)) ** 6).astype(np.float32)
    largest = np.take_along_axis(weights, np.abs(weights).argmax(0)[None], 0)[0]

    def errors(scale: np.ndarray) -> np.ndarray:
        return (importance * (np.rint(weights / scale).clip(-8, 7) * scale - weights) ** 2).sum(0)

    for shrinkings in ((1,), SHRINKINGS):
        least = np.min([errors(largest / end * shrinking) for shrinking in shrinkings for end in (-8, 7)], axis=0)
        np.testing.assert_allclose(errors(_scale(weights, importance, shrinkings)), least, rtol=1e-4)


def test_int4_for_inputs_that_are_always_zero_is_the_nearest() -> None:
    values = matrix(BLOCK, 30)
    zero = np.zeros((BLOCK, BLOCK), np.float32)
    steps = np.abs(int4_by_block(values, zero)[1]).T
    error = np.abs(unpack_int4(*int4_by_block(values, zero), BLOCK) - values)
    assert (error[1:] <= 8 * steps).all() and np.isfinite(error).all()
