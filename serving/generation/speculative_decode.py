"""Speculative decoding: `token_selection.Steps` of a single prompt, in steps that verify several drafted tokens.

The tokens equal those of single-token steps. A token that the last bits of a verify step could change is sampled after
single-token steps over all positions that verify steps wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from serving.backends.base import FloatArray, IntArray, SpeculativeBackend
from serving.generation.drafts import Draft, Drafter
from serving.sampling import SamplingParams
from serving.sampling.certainty import absolute_tolerance, is_certain

PATIENCE = 16
"""A sequence stops to speculate once it has repeated this many more positions than drafts have saved it steps."""


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
        self._tolerance, self._drafter = step.tolerance, Drafter(step, backend.draft_table)
        self._drafter.extend(prompt)
        self._tokens = list(prompt)
        self._state, self._lines = backend.prefill([prompt], capacity)
        self._draft: Draft | None = None
        self._row = self._saved = 0
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
            self.accepted, self._saved = self.accepted + 1, self._saved + 1
            return
        place = len(self._tokens) - 1
        if self._draft is not None:
            self._backend.rewind(self._state, place)
        self._drafter.extend(self._tokens[len(self._drafter.tokens) :])
        generated = len(self._tokens) - self._prompt_length
        room = min(self._params.max_new_tokens - generated, self._capacity - place) - 1
        self._draft = None if self._saved < -PATIENCE else self._drafter.draft(room)
        self._row = 0
        if self._draft is None:
            self._lines = self._backend.decode(self._state, tokens)
            return
        self.drafted += len(self._draft.tokens)
        self._lines = self._backend.verify(self._state, np.array([token, *self._draft.tokens], np.int64))
        if self._inexact is None and self._tolerance:
            self._inexact = place

    def _certain(self, token: int, rows: IntArray, step: int) -> bool:
        line = self._sampler.edited(self.logits, rows)[0]
        tolerance = absolute_tolerance(line, self._params, self._tolerance)
        return is_certain(line, token, self._params, self._params.seed, step, tolerance)

    def _replay(self) -> None:
        """Decode all inexact positions again, one token a step."""
        assert self._inexact is not None
        self._backend.rewind(self._state, self._inexact)
        repeated = self._tokens[self._inexact :]
        for token in repeated:
            self._lines = self._backend.decode(self._state, np.array([token], np.int64))
        self.replayed, self._saved = self.replayed + len(repeated), self._saved - len(repeated)
        self._inexact, self._draft, self._row = None, None, 0
