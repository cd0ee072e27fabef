"""Reads the fixtures: a checkpoint folder, its Keras model, and the logits that PyTorch computed with it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FOLDER = Path(__file__).parent / "fixtures"
NAMES = ("one_block", "odd_heads", "wide_heads", "deep", "bytes")


@dataclass(frozen=True)
class Case:
    """Token ids and mask [batch, sequence] and the logits [batch, sequence, vocab_size] that belong to them."""

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    logits: NDArray[np.float32]

    @property
    def positions(self) -> NDArray[np.int64]:
        """Each token's position among its row's tokens; 0 for padding in front."""
        return np.clip(np.cumsum(self.mask, axis=1) - 1, 0, None)


@functools.cache
def read_cases(name: str) -> dict[str, Case]:
    """The cases "full", "left" and "right" of the fixture `name`."""
    with np.load(FOLDER / name / "cases.npz") as arrays:
        table: dict[str, Any] = dict(arrays)
    table["full_mask"] = np.ones_like(table["full_ids"])
    return {
        kind: Case(table[f"{kind}_ids"], table[f"{kind}_mask"], table[f"{kind}_logits"])
        for kind in ("full", "left", "right")
    }


@functools.cache
def keras_model(name: str) -> Any:
    """The fixture's weights in our Keras model; shared by all tests, so nobody may change it."""
    from builder.model.geometry import read_geometry
    from builder.model.gpt2 import GPT2
    from builder.model.pretrained import load_weights

    model = GPT2.create(read_geometry(FOLDER / name))
    load_weights(model, FOLDER / name)
    return model


def max_difference(ours: Any, theirs: Any, mask: Any = None) -> float:
    """Largest absolute difference, where `mask` is nonzero; fails unless both are finite and of equal shape."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    difference = np.abs(ours.astype(np.float64) - theirs)
    if mask is not None:
        difference = difference[np.asarray(mask) > 0]
    assert difference.size and np.isfinite(difference).all()
    return float(difference.max())
