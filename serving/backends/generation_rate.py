"""Measures how fast a graph of a bundle generates with a number of threads."""

from __future__ import annotations

import statistics
import time

import numpy as np

from serving.backends.loader import load_backend
from serving.backends.prefill_graph import AUTO
from serving.bundle import Bundle

_TOKENS = 128
_BATCH_TOKENS = 2048
_STEPS = 64
_STEP_SECONDS = 1.0


def generation_rate(bundle: Bundle, graph: str, threads: int, batch_size: int, prefill_graph: str = AUTO) -> float:
    """New tokens per second of a batch of prompts of 128 tokens that are continued by 128, prefill included.

    Shorter where the context is. Large batches get shorter prompts, 2,048 tokens together. The time of a decode step is
    the median of those that fit into a second.
    """
    backend = load_backend(bundle, "onnx", graph, threads=threads, prefill_graph=prefill_graph)
    length = max(1, min(_TOKENS, backend.n_positions // 2, _BATCH_TOKENS // batch_size))
    steps = max(1, min(_STEPS, backend.n_positions - length))
    prompts = [[bundle.manifest.model.eos_token_id] * length] * batch_size
    tokens = np.zeros(batch_size, np.int64)
    # The first pass takes memory.
    backend.prefill(prompts[:1], length)
    began = time.perf_counter()
    state, _ = backend.prefill(prompts, length + steps)
    prefill = time.perf_counter() - began
    taken: list[float] = []
    while len(taken) < steps and (len(taken) < 3 or sum(taken) < _STEP_SECONDS):
        began = time.perf_counter()
        backend.decode(state, tokens)
        taken.append(time.perf_counter() - began)
    return batch_size * length / (prefill + length * statistics.median(taken))
