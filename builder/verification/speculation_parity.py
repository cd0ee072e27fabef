"""Compares speculative decoding with plain decoding: tokens, and how far the logits of a verify step are off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.backends.onnx import OnnxBackend
from serving.bundle import Bundle
from serving.errors import ParityError
from serving.generation import generate
from serving.generation.ngram_table import load_ngram_table
from serving.generation.pacing import Pacing
from serving.sampling import SamplingParams
from serving.sampling.certainty import absolute_tolerance, is_certain, logit_scale

SETTINGS = {
    "greedy": SamplingParams(ignore_eos=True),
    "temperature 0.8": SamplingParams(temperature=0.8, ignore_eos=True),
    "penalties": SamplingParams(temperature=0.6, top_p=0.9, frequency_penalty=0.5, ignore_eos=True),
}


def compare_speculation(
    bundle: Bundle,
    name: str,
    prompts: Sequence[Sequence[int]],
    candidates: NDArray[np.int64],
    alone: int,
    prefill_graph: str | None = None,
) -> dict[str, Any] | None:
    """The record of the graph `name`, with prompts of `prefill_graph`; None where it does not decode speculatively.

    Every prompt's greedy tokens, `candidates` [prompts, new tokens], are fed in verify steps: of `of`
    tokens there, `certain` are certain, and `equal` of these are the candidates. The first `alone` prompts are
    generated with and without speculation under each of SETTINGS, and `deviation` is the largest difference between
    their logits in verify steps and in single-token steps, as a share of `logit_scale`.

    Raises ParityError if a token differs, or if the deviation is over the tolerance that decides what is certain.
    """
    backend = OnnxBackend(bundle, name, speculation=True, prefill_graph=prefill_graph)
    step = backend.verify_step
    if step is None:
        return None
    backend.draft_table = load_ngram_table(bundle)
    backend.pacing = Pacing(step, measured=False)
    verified = {"of": 0, "certain": 0, "equal": 0}
    deviation = 0.0
    for number, (prompt, row) in enumerate(zip(prompts, candidates, strict=True)):
        logits = _verified(backend, prompt, row, step.tokens)
        _count(verified, logits, row, step.tolerance)
        if number < alone:
            deviation = max(deviation, _deviation(logits, _single(backend, prompt, row)))
    generated = {
        setting: _generated(backend, prompts[:alone], replace(params, max_new_tokens=candidates.shape[1]))
        for setting, params in SETTINGS.items()
    }
    record = {
        "verified": verified,
        "generated": generated,
        "deviation": deviation,
        "tolerance": step.tolerance,
    }
    _judge(name, record)
    return record


def _verified(backend: OnnxBackend, prompt: Sequence[int], row: NDArray[np.int64], most: int) -> NDArray[np.float32]:
    """The logits that each token of `row` is sampled from, after the first, from verify steps."""
    state, _ = backend.prefill([prompt], len(prompt) + len(row))
    found = []
    for start in range(0, len(row) - 1, most):
        chunk = row[start : min(start + most, len(row) - 1)]
        found.append((backend.verify if len(chunk) > 1 else backend.decode)(state, chunk).copy())
    return np.concatenate(found) if found else np.empty((0, backend.vocab_size), np.float32)


def _single(backend: OnnxBackend, prompt: Sequence[int], row: NDArray[np.int64]) -> NDArray[np.float32]:
    """The same from single-token steps."""
    state, _ = backend.prefill([prompt], len(prompt) + len(row))
    found = [backend.decode(state, row[step : step + 1]).copy() for step in range(len(row) - 1)]
    return np.concatenate(found) if found else np.empty((0, backend.vocab_size), np.float32)


def _count(record: dict[str, int], logits: NDArray[np.float32], row: NDArray[np.int64], share: float) -> None:
    params = SETTINGS["greedy"]
    for line, token in zip(logits, row[1:].tolist(), strict=True):
        certain = not share or is_certain(
            line, int(line.argmax()), params, 0, 0, absolute_tolerance(line, params, share)
        )
        record["of"] += 1
        record["certain"] += certain
        record["equal"] += certain and int(line.argmax()) == token


def _deviation(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    if not len(ours):
        return 0.0
    scale = np.array([logit_scale(line) for line in theirs])
    return float((np.abs(ours - theirs).max(-1) / scale).max())


def _generated(backend: OnnxBackend, prompts: Sequence[Sequence[int]], params: SamplingParams) -> dict[str, int]:
    """How many tokens are the same with and without speculation, each prompt alone."""
    step, equal, total = backend.verify_step, 0, 0
    for seed, prompt in enumerate(prompts):
        answers = []
        for each in (step, None):
            backend.verify_step = each
            (answer,) = generate(backend, [prompt], replace(params, seed=seed), backend.vocab_size - 1)
            answers.append(answer.token_ids)
        equal += sum(one == other for one, other in zip(*answers, strict=False))
        total += len(answers[1])
    backend.verify_step = step
    return {"equal": equal, "of": total}


def _judge(name: str, record: dict[str, Any]) -> None:
    verified = record["verified"]
    failed = [
        f"only {one['equal']} of {one['of']} tokens are those of plain decoding ({setting})"
        for setting, one in record["generated"].items()
        if one["equal"] != one["of"]
    ]
    if verified["equal"] != verified["certain"]:
        failed.append(f"only {verified['equal']} of {verified['certain']} certain tokens are those of plain decoding")
    if not record["deviation"] <= record["tolerance"]:
        failed.append(f"logits of a verify step are off by {record['deviation']:.1e}; {record['tolerance']:.0e} may be")
    if failed:
        raise ParityError(f"parity failed in the speculative decoding of {name}: {failed[0]}; nothing was published")
