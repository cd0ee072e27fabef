"""The arithmetic of quantized weights: int8 by column, and 4 bits by block, as ONNX Runtime's operators read them.

Nothing here knows of graphs; `builder.onnx_export.precisions` puts the results into one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

INT8_LARGEST = 64
"""Processors without VNNI add two products of byte and weight in 16 bits; 2 * 255 * 64 fits, with 127 it would not."""
BLOCK = 32
"""Inputs that share one 4-bit scale. With larger blocks a row's sums depend on how many rows there are."""
DAMPING = 0.01
SHRINKINGS = (1.0, 0.95, 0.9, 0.85, 0.8)
_WHOLE = 512


def int8_by_axis(matrix: FloatArray, axis: int) -> tuple[NDArray[np.int8], FloatArray]:
    """Quantize a matrix to int8 in -64 to 64, one scale for each line along `axis`.

    Returns (values, scales); `values * expand_dims(scales, axis)` is the matrix to half a scale.
    """
    largest = np.abs(matrix).max(axis)
    scales = (np.where(largest > 0, largest, 1) / INT8_LARGEST).astype(np.float32)
    values = np.rint(matrix / np.expand_dims(scales, axis)).clip(-INT8_LARGEST, INT8_LARGEST)
    return values.astype(np.int8), scales


def int4_by_block(
    matrix: FloatArray, moments: FloatArray | None = None, damping: float = DAMPING
) -> tuple[NDArray[np.uint8], FloatArray]:
    """Quantize [inputs, outputs] to 4 bits in blocks of 32 inputs, as `MatMulNBits` reads them.

    Returns (packed, scales): packed is [outputs, blocks, 16] uint8, two values a byte, the first in the low half; the
    scales are [outputs, blocks]. A value q of 0 to 15 stands for (q - 8) * scale. The largest weight of a block becomes
    -8 or, where the block's squared error is less, 7: what lies on its other side then has the longer end.

    Without `moments` every weight goes to its nearest value. With the mean of x x^T over the matrix's inputs x,
    [inputs, inputs], the inputs that follow make up for what rounding an input's weights adds to the products, as in
    GPTQ (Frantar et al. 2022, arXiv:2210.17323, its algorithm 1, in the inputs' own order), and a block's scale may be
    smaller than its largest weight asks for. `damping` times the mean of the diagonal is added to the diagonal: the
    more, the nearer the weights themselves stay to what they were.
    """
    inputs, outputs = matrix.shape
    blocks = -(-inputs // BLOCK)
    # A row for each input, so that the loop below works on memory that lies together.
    weights = np.zeros((blocks * BLOCK, outputs), np.float32)
    weights[:inputs] = matrix
    values = np.empty(weights.shape, np.uint8)
    scales = np.empty((blocks, outputs), np.float32)
    spread = None if moments is None else _spread(moments, damping, len(weights))
    for block in range(blocks):
        lines = slice(block * BLOCK, (block + 1) * BLOCK)
        own = weights[lines]
        if spread is None:
            scales[block] = _scale(own, np.ones((BLOCK, 1), np.float32), (1,))
            values[lines] = _nearest(own, scales[block]) + 8
            continue
        within = spread[lines, lines]
        scales[block] = _scale(own, np.diag(within)[:, None] ** -2, SHRINKINGS)
        errors = np.empty_like(own)
        for line in range(BLOCK):
            nearest = _nearest(own[line], scales[block])
            values[lines][line] = nearest + 8
            errors[line] = (own[line] - nearest * scales[block]) / within[line, line]
            own[line + 1 :] -= within[line, line + 1 :, None] * errors[line]
        weights[lines.stop :] -= spread[lines, lines.stop :].T @ errors
    packed = (values[0::2] | (values[1::2] << np.uint8(4))).T.reshape(outputs, blocks, BLOCK // 2)
    return np.ascontiguousarray(packed), np.ascontiguousarray(scales.T)


def _spread(moments: FloatArray, damping: float, width: int) -> FloatArray:
    """The upper triangular U with U^T U the inverse of the damped moments, widened to [width, width] by the identity.

    Its line i says how the error of input i is passed to the inputs after it.
    """
    damped = np.eye(width)
    inputs = len(moments)
    damped[:inputs, :inputs] = moments
    diagonal = np.arange(inputs)
    damped[diagonal, diagonal] += damping * float(np.diag(moments).mean()) or 1.0
    # Turned about both axes, the lower factor of H = R R^T becomes an upper one, R, and U is its inverse. The largest
    # model's widest matrix has 6,400 inputs, so each of these is 0.3 GB and goes as soon as the next is there.
    turned = np.ascontiguousarray(damped[::-1, ::-1])
    del damped
    lower = np.linalg.cholesky(turned)
    del turned
    upper = np.ascontiguousarray(lower[::-1, ::-1])
    del lower
    _invert(upper)
    return upper.astype(np.float32)


def _invert(upper: NDArray[np.float64]) -> None:
    """Turn an upper triangular matrix into its inverse, by halves: most of the work is then products of matrices."""
    half = len(upper) // 2
    if len(upper) <= _WHOLE:
        upper[:] = np.triu(np.linalg.inv(upper))
        return
    first, between, second = upper[:half, :half], upper[:half, half:], upper[half:, half:]
    _invert(first)
    _invert(second)
    between[:] = -first @ between @ second


def _scale(weights: FloatArray, importance: FloatArray, shrinkings: tuple[float, ...]) -> FloatArray:
    """A scale for each column of a block, [BLOCK, outputs]: the one of the least squared error, by importance."""
    extreme = np.take_along_axis(weights, np.abs(weights).argmax(0)[None], 0)[0]
    extreme[extreme == 0] = 1
    best: FloatArray = extreme / np.float32(-8)
    least = np.full(best.shape, np.inf, np.float32)
    for shrinking in shrinkings:
        for end in (-8, 7):
            scale = np.divide(extreme, end, dtype=np.float32) * np.float32(shrinking)
            error = (importance * (_nearest(weights, scale) * scale - weights) ** 2).sum(0)
            best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best


def _nearest(weights: FloatArray, scale: FloatArray) -> FloatArray:
    nearest: FloatArray = np.rint(weights / scale).clip(-8, 7)
    return nearest
