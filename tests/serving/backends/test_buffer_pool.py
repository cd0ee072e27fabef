"""Memory that batches hand on to each other, and what must not go with it."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.backends.buffer_pool import SpareMemory
from serving.backends.loader import load_backend
from serving.bundle import Bundle, open_bundle

FLOAT = np.dtype(np.float32)


@pytest.fixture(scope="module")
def bundle(real_bundle: Path) -> Bundle:
    return open_bundle(real_bundle)


def text(backend: Any, starts: list[int], capacity: int, steps: int) -> np.ndarray:
    """Logits of a ragged batch and of some steps after it, [steps + 1, rows, vocab_size]."""
    random = np.random.default_rng(7)
    state, logits = backend.prefill([random.integers(0, 256, start).tolist() for start in starts], capacity)
    result = [logits.copy()]
    for _ in range(steps):
        result.append(backend.decode(state, random.integers(0, 256, len(starts))).copy())
    return np.array(result)


def test_memory_is_handed_on_when_nothing_refers_to_it() -> None:
    memory = SpareMemory()
    first = memory.take((4, 8), FLOAT)
    place, view = first.ctypes.data, first[1:].reshape(-1)
    second = memory.take((4, 8), FLOAT)
    assert second.ctypes.data != place
    del first
    gc.collect()
    view[:] = 3
    third = memory.take((4, 8), FLOAT)
    third[:] = 5
    assert (view == 3).all(), "a view keeps its array's memory"
    del view
    smaller = memory.take((3, 8), FLOAT)
    assert smaller.ctypes.data == place and smaller.shape == (3, 8)
    del smaller
    assert memory.take((5, 8), FLOAT).shape == (5, 8), "and it does not fit what is larger"


def test_a_large_batchs_memory_is_let_go() -> None:
    memory = SpareMemory()
    memory.take((1000,), FLOAT)
    memory.take((10,), FLOAT)
    assert sum(spare.size for spare in memory._spare) == 40


@pytest.mark.parametrize("in_parts", [False, True])
def test_what_a_batch_leaves_behind_does_not_matter(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, in_parts: bool
) -> None:
    if in_parts:
        monkeypatch.setattr("serving.backends.onnx.PREFILL_TOKENS", 12)
    fresh, used = (load_backend(bundle, "onnx", "ort/fp32") for _ in range(2))
    for starts, capacity in (([5, 2, 9, 3], 30), ([3, 1], 20), ([7, 7, 1], 48)):
        state = used.open([[1, 2]] * 6, 40)
        for memory in (used._cache_memory, used._logits_memory):
            memory._spare.clear()
        del state
        for memory in (used._cache_memory, used._logits_memory):
            memory._spare[0].view(np.float32)[:] = np.nan
        place = used._cache_memory._spare[0].ctypes.data
        wanted = text(fresh, starts, capacity, 10)
        got = text(used, starts, capacity, 10)
        assert used._cache_memory._spare[0].ctypes.data == place, "it is used again"
        assert np.array_equal(got, wanted)
        fresh._cache_memory._spare.clear()


@pytest.mark.parametrize("graph", ["ort/fp32", "onnx/portable"])
def test_logits_outlive_their_state(bundle: Bundle, graph: str) -> None:
    backend = load_backend(bundle, "onnx", graph)
    state, logits = backend.prefill([[1, 2, 3], [4]], 10)
    kept = logits.copy()
    del state
    gc.collect()
    text(backend, [3, 1], 10, 2)
    assert np.array_equal(logits, kept)
