"""Compares tokens sampled by `ort/choose` with those sampled on the host, on the bundle's own logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builder.verification.logit_parity import batches
from serving.backends.onnx import OnnxBackend
from serving.errors import ParityError
from serving.generation.token_selection import BatchSampler
from serving.sampling import SamplingParams

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "top-k and top-p": {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
    "all tokens": {"temperature": 1.0},
    "min-p and penalties": {"temperature": 1.3, "min_p": 0.02, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
}


def compare_sampling(
    backend: OnnxBackend, prompts: Sequence[Sequence[int]], candidates: NDArray[np.int64], batch_size: int
) -> dict[str, dict[str, int]]:
    """Choose at every step of `candidates`, [prompts, new tokens], on both sides and under each of SETTINGS.

    Of `draws`, `exact` are those that the graph calls certain, and `equal` those among them that the host makes too.
    Raises ParityError if a certain one is not the host's.
    """
    records = {name: {"draws": 0, "exact": 0, "equal": 0} for name in SETTINGS}
    for rows in batches(len(prompts), batch_size):
        _compare_batch(records, backend, prompts[rows], candidates[rows])
    for name, record in records.items():
        if record["equal"] != record["exact"]:
            raise ParityError(
                f"parity failed in ort/choose: only {record['equal']} of {record['exact']} tokens that it calls "
                f"certain are the host's ({name}); nothing was published"
            )
    return records


def _compare_batch(
    records: dict[str, dict[str, int]],
    backend: OnnxBackend,
    prompts: Sequence[Sequence[int]],
    candidates: NDArray[np.int64],
) -> None:
    choosers = {
        name: BatchSampler(prompts, [SamplingParams(**values, seed=seed) for seed in range(len(prompts))])
        for name, values in SETTINGS.items()
    }
    rows = np.arange(len(prompts))
    state = backend.open(prompts, max(map(len, prompts)) + candidates.shape[1])
    for step in range(candidates.shape[1]):
        for name, chooser in choosers.items():
            choice = backend.sample_tokens(state, chooser.request(step, backend.vocab_size))
            same = choice.tokens == chooser.sample_tokens(backend.logits(state), rows, step)
            records[name]["draws"] += len(rows)
            records[name]["exact"] += int(choice.exact.sum())
            records[name]["equal"] += int((same & choice.exact).sum())
            chooser.add(rows, candidates[:, step])
        if step + 1 < candidates.shape[1]:
            backend.advance(state, candidates[:, step])
