"""GGML's encodings of a matrix: float32, float16, and blocks of 32 weights in 8 or 4 bits.

Layouts: `ggml/src/ggml-common.h` of llama.cpp. A block is the scale in float16 and then its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 32
"""Weights of a row that share a scale."""


@dataclass(frozen=True)
class Encoding:
    """One encoding: its numbers in GGML and in `general.file_type`, and its bytes.

    `encode` takes float32 [..., n] and gives bytes row by row. `n` must be a multiple of `block`, whose weights take
    `block_bytes`.
    """

    ggml_type: int
    file_type: int
    block: int
    block_bytes: int
    encode: Callable[[NDArray[np.float32]], bytes]


def _plain(dtype: str) -> Callable[[NDArray[np.float32]], bytes]:
    def encode(values: NDArray[np.float32]) -> bytes:
        return np.ascontiguousarray(values, dtype).tobytes()

    return encode


def _q8_0(values: NDArray[np.float32]) -> bytes:
    """Symmetric int8: the largest magnitude of a block becomes 127; halves are rounded away from zero."""
    blocks = values.reshape(-1, BLOCK)
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(scale)
    rounded = np.copysign(np.floor(np.abs(scaled) + np.float32(0.5)), scaled)
    return _blocks(scale, rounded.astype(np.int8))


def _q4_0(values: NDArray[np.float32]) -> bytes:
    """4 bits with an offset of 8: the weight of the largest magnitude becomes 0, which stands for -8 scales.

    A byte holds weight i in its low half and weight i + 16 in its high half.
    """
    blocks = values.reshape(-1, BLOCK)
    scale = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1) / np.float32(-8)
    codes = np.clip(np.floor(blocks.astype(np.float64) * _inverse(scale) + 8.5), 0, 15).astype(np.uint8)
    low, high = codes[:, : BLOCK // 2], codes[:, BLOCK // 2 :]
    return _blocks(scale, low | high << 4)


def _inverse(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    with np.errstate(divide="ignore"):
        return np.where(scale == 0, np.float32(0), np.float32(1) / scale)


def _blocks(scale: NDArray[np.float32], codes: NDArray[Any]) -> bytes:
    return np.concatenate([scale.astype("<f2").view(np.uint8), codes.view(np.uint8)], 1).tobytes()


ENCODINGS = {
    "f32": Encoding(0, 0, 1, 4, _plain("<f4")),
    "f16": Encoding(1, 1, 1, 2, _plain("<f2")),
    "q8_0": Encoding(8, 7, BLOCK, 2 + BLOCK, _q8_0),
    "q4_0": Encoding(2, 2, BLOCK, 2 + BLOCK // 2, _q4_0),
}
