"""Speculative decoding: `token_selection.Steps` of a single prompt, in steps that verify several drafted tokens.

The tokens equal those of single-token steps. A token that the last bits of a verify step could change is sampled after
single-token steps over all positions that verify steps wrote.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from serving.backends.base import FloatArray, IntArray, SpeculativeBackend
from serving.generation.drafts import Draft, Drafter
from serving.generation.pacing import Pacing
from serving.sampling import SamplingParams
from serving.sampling.certainty import absolute_tolerance, is_certain, is_far_ahead


class SequenceSampler(Protocol):
    """What `SpeculativeSteps` needs of `serving.generation.token_selection.BatchSampler`."""

    def sample_tokens(self, logits: FloatArray, rows: IntArray, step: int) -> IntArray: ...

    def edited(self, logits: FloatArray, rows: IntArray) -> FloatArray: ...

    def add(self, rows: IntArray, tokens: IntArray) -> None: ...


class SpeculativeSteps:
    """A single sequence that decodes speculatively."""

    def __init__(
        self,
        backend: SpeculativeBackend,
        sampler: SequenceSampler,
        prompt: Sequence[int],
        params: SamplingParams,
        capacity: int,
    ) -> None:
        self._backend, self._sampler, self._params = backend, sampler, params
        self._capacity, self._prompt_length = capacity, len(prompt)
        step = backend.verify_step
        assert step is not None, "the backend verifies no drafts; check `supports_speculation` first"
        pacing: Pacing = backend.pacing or Pacing(step)
        backend.pacing = pacing
        self._tolerance, self._pace = step.tolerance, pacing.pace(params)
        self._drafter = Drafter(step.tokens, self._pace, backend.draft_table)
        self._drafter.extend(prompt)
        self._tokens = list(prompt)
        self._state, self._lines = backend.prefill([prompt], capacity)
        self._draft: Draft | None = None
        self._row = 0
        self._times: tuple[float, float, float] | None = None
        """When the newest step began, when its draft was there, and when its logits were."""
        self._inexact: int | None = None
        """The first position that a verify step wrote; None where all have the bits of single-token steps."""
        self.drafted = self.accepted = self.replayed = 0

    @property
    def logits(self) -> FloatArray:
        """The logits of the next token, [1, vocab_size], before bias and penalties; `feed` overwrites them."""
        return self._lines[self._row : self._row + 1]

    def sample_tokens(self, rows: IntArray, step: int) -> IntArray:
        """See `Steps.sample_tokens`."""
        tokens = self._sampler.sample_tokens(self.logits, rows, step)
        if self._inexact is not None and not self._certain(int(tokens[0]), rows, step):
            self._replay()
            tokens = self._sampler.sample_tokens(self.logits, rows, step)
        self._sampler.add(rows, tokens)
        return tokens

    def feed(self, tokens: IntArray) -> None:
        """See `Steps.feed`."""
        token = int(tokens[0])
        self._tokens.append(token)
        if self._draft is not None and self._row < len(self._draft.tokens) and self._draft.tokens[self._row] == token:
            self._row += 1
            self.accepted += 1
            return
        self._measure(self._row + 1)
        place = len(self._tokens) - 1
        if self._draft is not None:
            self._backend.rewind(self._state, place)
        began = time.perf_counter()
        self._draft, self._row = self._next_draft(place), 0
        drafted = time.perf_counter()
        if self._draft is None:
            self._lines = self._backend.decode(self._state, tokens)
        else:
            self.drafted += len(self._draft.tokens)
            self._lines = self._backend.verify(self._state, np.array([token, *self._draft.tokens], np.int64))
            if self._inexact is None and self._tolerance:
                self._inexact = place
        self._times = began, drafted, time.perf_counter()

    def _next_draft(self, place: int) -> Draft | None:
        if not self._pace.drafts:
            return None
        self._drafter.extend(self._tokens[len(self._drafter.tokens) :])
        generated = len(self._tokens) - self._prompt_length
        return self._drafter.draft(min(self._params.max_new_tokens - generated, self._capacity - place) - 1)

    def _measure(self, emitted: int) -> None:
        """Record the newest step, which gave `emitted` tokens."""
        if self._times is None:
            return
        (began, drafted, verified), self._times = self._times, None
        sampling = time.perf_counter() - verified
        if self._draft is not None:
            length = len(self._draft.tokens)
            self._pace.on_verified(length, emitted, drafted - began, verified - drafted, sampling)
        else:
            self._pace.on_plain(verified - drafted + sampling, drafted - began, self._inexact is None)

    def _certain(self, token: int, rows: IntArray, step: int) -> bool:
        line = self._sampler.edited(self.logits, rows)[0]
        if is_far_ahead(line, token, self._params, self._tolerance):
            return True
        tolerance = absolute_tolerance(line, self._params, self._tolerance)
        return is_certain(line, token, self._params, self._params.seed, step, tolerance)

    def _replay(self) -> None:
        """Decode all inexact positions again, one token a step."""
        assert self._inexact is not None
        self._measure(self._row)
        self._backend.rewind(self._state, self._inexact)
        repeated = self._tokens[self._inexact :]
        for token in repeated:
            self._lines = self._backend.decode(self._state, np.array([token], np.int64))
            self._pace.on_replayed()
        self.replayed += len(repeated)
        self._inexact, self._draft, self._row = None, None, 0
