"""What a variant in fewer bits is fitted to: what the blocks see of training text, one block after the other.

Only one block's statistics are held at a time, so a model's size decides of the memory that its widest matrix needs:
four bytes for each pair of its inputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builder.data.token_shards import open_tokens
from builder.keras_backend import ops
from builder.model.gpt2 import GPT2
from builder.model.kernels import Kernels
from builder.onnx_export.quantization import FloatArray

ROWS = 8
TEXTS, LENGTH = 32, 128


def calibration_texts(shard: Path, n_positions: int, seed: int) -> NDArray[np.int32]:
    """Return 32 stretches of a shard's tokens, [32, length]: 128 tokens each, or fewer where text or context is short.

    Raises InputError as `open_tokens` does.
    """
    tokens = open_tokens(shard)
    length = min(n_positions, len(tokens), LENGTH)
    starts = np.random.default_rng(seed).integers(0, len(tokens) - length + 1, TEXTS)
    return np.stack([np.asarray(tokens[start : start + length], np.int32) for start in starts])


class Calibration:
    """Statistics of `model` in float32 over `texts`, [rows, length] token ids. Ask for them in the model's order."""

    def __init__(self, model: GPT2, texts: NDArray[np.int32]) -> None:
        self._model = model
        kernels = Kernels(model.geometry.n_head)
        positions = ops.arange(texts.shape[1])[None, :]
        self._hidden = [
            kernels.embed(model.wte, texts[first : first + ROWS]) + kernels.embed(model.wpe, positions)
            for first in range(0, len(texts), ROWS)
        ]
        self._seen = _Seen(model.geometry.n_head)
        self._blocks = 0
        self._ended = False

    def moments(self, weight: str) -> FloatArray:
        """The mean of x x^T over the rows x that the matrix of this name is multiplied with, [inputs, inputs].

        `weight` is "transformer.h.N.attn.c_attn.weight" or the like, or the token table's for the head.
        """
        if weight == "transformer.wte.weight":
            self._advance(len(self._model.blocks))
            if not self._ended:
                self._ended = True
                self._seen.moments = {}
                for hidden in self._hidden:
                    self._seen.take("head", self._model.ln_f(hidden))
            return self._seen.mean("head")
        _, _, block, part, layer, _ = weight.split(".")
        self._advance(int(block) + 1)
        return self._seen.mean(self._model.blocks[int(block)].matrices[f"{part}.{layer}"].name)

    def largest(self, block: int) -> tuple[FloatArray, FloatArray]:
        """The largest absolute key and value of a block by channel, each [n_head, head_dim]."""
        self._advance(block + 1)
        key, value = self._seen.largest
        return key, value

    def _advance(self, blocks: int) -> None:
        assert blocks >= self._blocks, "statistics are kept of one block only; ask in the model's order"
        while self._blocks < blocks:
            self._seen = _Seen(self._model.geometry.n_head)
            block = self._model.blocks[self._blocks]
            self._hidden = [block(hidden, kernels=self._seen) for hidden in self._hidden]
            self._blocks += 1


class _Seen(Kernels):
    """Plain kernels that look at what passes through them."""

    def __init__(self, n_head: int) -> None:
        super().__init__(n_head)
        self.moments: dict[str, FloatArray] = {}
        self.count: dict[str, int] = {}
        self.largest: list[FloatArray] = []

    def dense(self, layer: Any, hidden: Any) -> Any:
        self.take(layer.name, hidden)
        return layer(hidden)

    def split_heads(self, qkv: Any) -> list[Any]:
        heads = super().split_heads(qkv)
        largest = [np.asarray(ops.max(ops.abs(part), axis=(0, 2))) for part in heads[1:]]
        self.largest = [np.maximum(*pair) for pair in zip(self.largest or largest, largest, strict=True)]
        return heads

    def take(self, name: str, hidden: Any) -> None:
        rows = np.asarray(hidden).reshape(-1, hidden.shape[-1])
        self.moments[name] = self.moments.get(name, np.float32(0)) + rows.T @ rows
        self.count[name] = self.count.get(name, 0) + len(rows)

    def mean(self, name: str) -> FloatArray:
        mean: FloatArray = self.moments[name] / np.float32(self.count[name])
        return mean
