"""The comparison of the two ways to choose a token: what it counts, what it refuses, and along which texts it goes."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from builder.verification.sampling_parity import SETTINGS, compare_sampling
from serving.backends.base import SampledTokens, SamplingRequest
from serving.errors import ParityError
from serving.sampling.candidate_sampling import sample_row
from tests.closed_form import logits_after

PROMPTS = [[1, 2, 3], [4], [5, 6]]
CANDIDATES = np.array([[7, 8, 9, 10], [11, 12, 13, 14], [15, 16, 17, 18]])


class Choosing:
    """A backend that chooses as the host does, but for the rows that `errs` names by what they hold."""

    vocab_size = 40

    def __init__(self, errs: Sequence[list[int]] = (), certain: bool = True) -> None:
        self.errs, self.certain = list(errs), certain
        self.texts: list[list[int]] = []
        self.penalised: list[int] = []

    def open(self, prompts: Sequence[Sequence[int]], capacity: int) -> Any:
        rows = [list(prompt) for prompt in prompts]
        assert capacity == max(map(len, prompts)) + CANDIDATES.shape[1]
        self.texts += rows
        return SimpleNamespace(rows=rows)

    def advance(self, state: Any, tokens: np.ndarray) -> None:
        for row, token in zip(state.rows, tokens.tolist(), strict=True):
            row.append(token)

    def logits(self, state: Any) -> np.ndarray:
        return np.stack([logits_after(row, self.vocab_size) for row in state.rows])

    def sample_tokens(self, state: Any, request: SamplingRequest) -> SampledTokens:
        rows, wanted = np.arange(len(state.rows)), request.sampling
        self.penalised.append(int((request.logits_processor.penalty != 0).any(1).sum()))
        found = [
            int(line.argmax()) if temperature == 0 else sample_row(line, temperature, int(top_k), *rest)
            for line, temperature, top_k, *rest in zip(
                request.logits_processor.apply(self.logits(state), rows), wanted.temperature, wanted.top_k,
                wanted.top_p, wanted.min_p, request.draw, strict=True,
            )
        ]  # fmt: skip
        wrong = np.array([row in self.errs for row in state.rows])
        return SampledTokens(np.array(found) + wrong, ~wrong | self.certain)


def test_every_row_and_step_is_compared_along_the_candidates() -> None:
    backend = Choosing()
    records = compare_sampling(backend, PROMPTS, CANDIDATES, 2)  # type: ignore[arg-type]
    assert records == {name: {"draws": 12, "exact": 12, "equal": 12} for name in SETTINGS}
    # The last token is not fed, as nothing is chosen behind it.
    assert backend.texts == [prompt + row[:3].tolist() for prompt, row in zip(PROMPTS, CANDIDATES, strict=True)]
    # Of four settings the last has penalties, on what was said before: two rows of a batch, then one.
    assert backend.penalised == [0, 0, 0, 0] + [0, 0, 0, 2] * 3 + [0, 0, 0, 0] + [0, 0, 0, 1] * 3


def test_a_certain_token_that_is_not_the_hosts_is_refused_and_an_uncertain_one_is_not() -> None:
    errs = [[4, 11], [5, 6, 15, 16, 17]]
    with pytest.raises(ParityError, match=r"only 10 of 12 tokens .* the host's \(greedy\); nothing was published"):
        compare_sampling(Choosing(errs), PROMPTS, CANDIDATES, 2)  # type: ignore[arg-type]
    records = compare_sampling(Choosing(errs, certain=False), PROMPTS, CANDIDATES, 2)  # type: ignore[arg-type]
    assert records == {name: {"draws": 12, "exact": 10, "equal": 10} for name in SETTINGS}
