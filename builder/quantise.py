"""The arithmetic of quantised weights: int8 by column, and 4 bits by block, as ONNX Runtime's operators read them.

Nothing here knows of graphs; `builder.variants` puts the results into one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

INT8_LARGEST = 64
"""Processors without VNNI add two products of byte and weight in 16 bits; 2 * 255 * 64 fits, with 127 it would not."""
BLOCK = 32
"""Inputs that share one 4-bit scale. With larger blocks a row's sums depend on how many rows there are."""


def int8_by_axis(matrix: FloatArray, axis: int) -> tuple[NDArray[np.int8], FloatArray]:
    """Quantise a matrix to int8 in -64 to 64, one scale for each line along `axis`.

    Returns (values, scales); `values * expand_dims(scales, axis)` is the matrix to half a scale.
    """
    largest = np.abs(matrix).max(axis)
    scales = (np.where(largest > 0, largest, 1) / INT8_LARGEST).astype(np.float32)
    values = np.rint(matrix / np.expand_dims(scales, axis)).clip(-INT8_LARGEST, INT8_LARGEST)
    return values.astype(np.int8), scales


def int4_by_block(matrix: FloatArray) -> tuple[NDArray[np.uint8], FloatArray]:
    """Quantise [inputs, outputs] to 4 bits in blocks of 32 inputs, as `MatMulNBits` reads them.

    Returns (packed, scales): packed is [outputs, blocks, 16] uint8, two values a byte, the first in the low half; the
    scales are [outputs, blocks]. A value q of 0 to 15 stands for (q - 8) * scale. The largest weight of a block becomes
    -8 or, where the block's squared error is less, 7: what lies on its other side then has the longer end.
    """
    inputs, outputs = matrix.shape
    padded = np.zeros((outputs, -(-inputs // BLOCK) * BLOCK), np.float32)
    padded[:, :inputs] = matrix.T
    blocks = padded.reshape(outputs, -1, BLOCK)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    extreme[extreme == 0] = 1
    on_8, on_7 = (np.divide(extreme, end, dtype=np.float32) for end in (-8, 7))
    scales = np.where(_squared_error(blocks, on_7) < _squared_error(blocks, on_8), on_7, on_8)
    values = (_nearest(blocks, scales) + 8).astype(np.uint8)
    packed = values[..., 0::2] | (values[..., 1::2] << np.uint8(4))
    return packed, scales[..., 0]


def _nearest(blocks: FloatArray, scales: FloatArray) -> FloatArray:
    nearest: FloatArray = np.rint(blocks / scales).clip(-8, 7)
    return nearest


def _squared_error(blocks: FloatArray, scales: FloatArray) -> FloatArray:
    error: FloatArray = ((_nearest(blocks, scales) * scales - blocks) ** 2).sum(-1, keepdims=True)
    return error
