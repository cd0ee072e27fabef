"""What packed 4-bit weights stand for, written from the operator's description and not from the packer."""

from __future__ import annotations

from typing import Any

import numpy as np


def unpack_int4(packed: Any, scales: Any, inputs: int) -> Any:
    """The matrix [inputs, outputs] of packed [outputs, blocks, bytes] and scales [outputs, blocks]."""
    outputs, blocks, size = packed.shape
    matrix = np.zeros((blocks * size * 2, outputs), np.float32)
    for index in range(blocks * size * 2):
        block, within = divmod(index, size * 2)
        byte = packed[:, block, within // 2]
        matrix[index] = (((byte >> 4) if within % 2 else (byte & 15)).astype(np.float32) - 8) * scales[:, block]
    return matrix[:inputs]
