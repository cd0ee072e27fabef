"""Comparing one runtime with the reference: logits at named places of ragged batches, greedy tokens, perplexity.

The reference is Keras in float32 without any cache. Greedy equality needs no reference loop: given candidate tokens,
one uncached pass over prompt and candidates shows the reference's own choice after every prefix, and if each agrees
with the next candidate then, by induction, the reference's greedy continuation is the candidate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.backends.base import Backend, FloatArray, pad_right

Reference = Callable[[NDArray[np.int64]], FloatArray]

# In the order in which they are judged: what says most about a difference comes first.
_PLACES = ("prefill", "first_decode", "last_position", "every_step", "alone")
# Two logits are as good as equal within this share of the row's largest: 64 float32 roundings.
_TIE = 64 * float(np.finfo(np.float32).eps)


@dataclass
class Place:
    """How a runtime's logits compare with the reference at one place: largest difference, and rows with equal argmax.

    `ties` counts rows whose argmax differs although the reference's two logits lie so close together, compared with its
    largest one, that the order of float32 additions decides between them. The measure is not the difference between
    the runtimes: no other choice is ever further from the reference than twice that.
    """

    max_abs: float = 0.0
    rows: int = 0
    argmax_equal: int = 0
    ties: int = 0
    first_mismatch: str | None = None

    def compare(self, reference: FloatArray, ours: FloatArray, where: str) -> None:
        """Take in one batch: logits [rows, vocab_size] of both sides."""
        difference = np.abs(reference - ours)
        # Not-a-number compares false with everything, so it must be made to count.
        worst = float(difference.max())
        self.max_abs = max(self.max_abs, math.inf if math.isnan(worst) else worst)
        self.rows += len(reference)
        theirs, choice = reference.argmax(-1), ours.argmax(-1)
        for row in range(len(reference)):
            if theirs[row] == choice[row]:
                self.argmax_equal += 1
            elif _is_tie(reference[row], theirs[row], choice[row]):
                self.ties += 1
            elif self.first_mismatch is None:
                self.first_mismatch = f"{where}, row {row}: token {choice[row]} where the reference has {theirs[row]}"

    @property
    def mismatches(self) -> int:
        """Rows with another argmax that is not a tie."""
        return self.rows - self.argmax_equal - self.ties

    def table(self) -> dict[str, Any]:
        """The figures as JSON, without what is empty."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def _is_tie(logits: FloatArray, best: int, other: int) -> bool:
    gap, size = float(logits[best]) - float(logits[other]), float(np.abs(logits).max())
    return gap <= _TIE * size < math.inf


@dataclass
class RuntimeReport:
    """One runtime's comparison at each place, and its perplexity compared with that of the reference."""

    places: dict[str, Place] = field(default_factory=dict)
    perplexity: float | None = None
    perplexity_relative: float | None = None

    def place(self, name: str) -> Place:
        """The figures of a place, made when first asked for."""
        return self.places.setdefault(name, Place())

    def table(self) -> dict[str, Any]:
        """The figures as JSON."""
        result: dict[str, Any] = {name: place.table() for name, place in self.places.items()}
        if self.perplexity is not None:
            result |= {"perplexity": self.perplexity, "perplexity_relative": self.perplexity_relative}
        return result

    def problem(self, max_abs: float, perplexity_relative: float) -> str | None:
        """What is over tolerance, as words that begin with the place, or None."""
        for name, place in self.places.items():
            if not place.max_abs <= max_abs:
                return f"{name}: logits differ by {place.max_abs:.3g}, more than the tolerance of {max_abs:.3g}"
            if place.mismatches:
                return f"{name}: {place.mismatches} of {place.rows} choices differ (first: {place.first_mismatch})"
        if self.perplexity_relative is not None and not self.perplexity_relative <= perplexity_relative:
            return (
                f"perplexity: {self.perplexity:.6g} differs from the reference by {self.perplexity_relative:.2e} "
                f"of it, more than {perplexity_relative:.2e}"
            )
        return None


def batches(count: int, size: int) -> list[slice]:
    """Slices of at most `size` that cover `count` items in order."""
    return [slice(start, start + size) for start in range(0, count, size)]


def greedy_tokens(backend: Backend, prompts: Sequence[Sequence[int]], new_tokens: int) -> NDArray[np.int64]:
    """Continue each prompt greedily, past the end token: [prompts, new_tokens]."""
    state, logits = backend.prefill(prompts, max(map(len, prompts)) + new_tokens)
    chosen = [logits.argmax(-1)]
    for _ in range(new_tokens - 1):
        chosen.append(backend.decode(state, chosen[-1]).argmax(-1))
    return np.stack(chosen, axis=1)


def reference_logits(
    reference: Reference, prompts: Sequence[Sequence[int]], candidates: NDArray[np.int64]
) -> FloatArray:
    """The reference's logits after each prompt and after each of its candidates but the last.

    `candidates` is [rows, new_tokens]; returns [rows, new_tokens, vocab_size], from one uncached, right-padded pass.
    """
    texts = [[*prompt, *tokens] for prompt, tokens in zip(prompts, candidates[:, :-1].tolist(), strict=True)]
    token_ids, _ = pad_right(texts)
    first = np.array([len(prompt) - 1 for prompt in prompts])
    places = first[:, None] + np.arange(candidates.shape[1])
    return np.take_along_axis(reference(token_ids), places[:, :, None], axis=1)


def compare_cached(
    report: RuntimeReport,
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    candidates: NDArray[np.int64],
    expected: FloatArray,
    batch: int,
) -> None:
    """Run one ragged batch through a backend's cache, fed the candidates, and compare it at every step.

    The places are prefill, first_decode, last_position and every_step; alone is row 0 run by itself against the same
    row in company.
    """
    for name in _PLACES:
        report.place(name)
    steps = candidates.shape[1]
    capacity = max(map(len, prompts)) + steps
    state, logits = backend.prefill(prompts, capacity)
    in_company = logits[0].copy()
    for step in range(steps):
        where = f"batch {batch}, step {step}"
        names = ["every_step"]
        names += ["prefill"] if step == 0 else ["first_decode"] if step == 1 else []
        names += ["last_position"] if step == steps - 1 else []
        for name in names:
            report.place(name).compare(expected[:, step], logits, where)
        if step < steps - 1:
            logits = backend.decode(state, candidates[:, step])
    _, alone = backend.prefill(prompts[:1], capacity)
    report.place("alone").compare(in_company[None], alone, f"batch {batch}, row 0 by itself")


def window_losses_cached(backend: Backend, windows: NDArray[np.int64]) -> float:
    """Sum of negative log-likelihoods (nats) of tokens 1.. of each window [rows, length], by decode steps."""
    state, logits = backend.prefill([row[:1].tolist() for row in windows], windows.shape[1])
    total = 0.0
    for position in range(1, windows.shape[1]):
        total += _losses(logits, windows[:, position])
        if position < windows.shape[1] - 1:
            logits = backend.decode(state, windows[:, position])
    return total


def window_losses_full(reference: Reference, windows: NDArray[np.int64]) -> float:
    """Sum of negative log-likelihoods (nats) of tokens 1.. of each window [rows, length], in one pass."""
    logits = reference(windows)[:, :-1]
    return _losses(logits.reshape(-1, logits.shape[-1]), windows[:, 1:].reshape(-1))


def token_losses(logits: FloatArray, targets: NDArray[Any]) -> NDArray[np.float64]:
    """Negative log-likelihoods (nats) of `targets` [rows] under logits [rows, vocab_size]."""
    shifted = (logits - logits.max(-1, keepdims=True)).astype(np.float64)
    normaliser = np.log(np.exp(shifted).sum(-1))
    losses: NDArray[np.float64] = normaliser - shifted[np.arange(len(targets)), targets]
    return losses


def _losses(logits: FloatArray, targets: NDArray[np.int64]) -> float:
    return float(token_losses(logits, targets).sum())
