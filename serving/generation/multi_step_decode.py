"""Multi-step decode: `token_selection.Steps` in blocks of several device steps.

The tokens equal those of single steps. The host samples a token of which the device is not certain, from its logits,
and the device repeats the steps after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from serving.backends.base import FloatArray, IntArray, SamplingRequest


class BlockSampler(Protocol):
    """What `MultiStepSteps` needs of `serving.generation.token_selection.BatchSampler`."""

    def sample_tokens(self, logits: FloatArray, rows: IntArray, step: int) -> IntArray: ...

    def request(self, step: int, vocab_size: int) -> SamplingRequest: ...

    def draws(self, step: int, count: int) -> FloatArray: ...

    def remaining(self, rows: IntArray, step: int) -> int: ...


class MultiStepSteps:
    """A batch that decodes in blocks."""

    def __init__(
        self, loop: Any, vocab_size: int, sampler: BlockSampler, prompts: Sequence[Sequence[int]], capacity: int
    ) -> None:
        self._loop, self._sampler, self._vocab_size, self._capacity = loop, sampler, vocab_size, capacity
        self._state = loop.open(prompts, capacity)
        self._lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        self._block = np.zeros((len(prompts), 0), np.int64)
        self._column, self._first, self._fed = 0, 0, self._lengths
        self._draws = self._num_uncertain = 0

    def sample_tokens(self, rows: IntArray, step: int) -> IntArray:
        """See `Steps.sample_tokens`."""
        if self._column == self._block.shape[1]:
            self._run(rows, step)
        raw = self._block[:, self._column]
        tokens, exact = np.where(raw < 0, -1 - raw, raw), raw >= 0
        uncertain = rows[~exact[rows]]
        self._draws, self._num_uncertain = self._draws + len(rows), self._num_uncertain + len(uncertain)
        if uncertain.size:
            tokens[uncertain] = self._sampler.sample_tokens(self._logits()[uncertain], uncertain, step)
            self._block = self._block[:, : self._column + 1]
            self._block[:, self._column] = tokens
            self._go_on(step, tokens)
        self._column += 1
        return tokens

    def feed(self, tokens: IntArray) -> None:
        """See `Steps.feed`."""
        made = self._block[:, self._column - 1]
        made = np.where(made < 0, -1 - made, made)
        if not np.array_equal(tokens, made):
            step = self._first + self._column - 1
            self._block = self._block[:, : self._column]
            self._block[:, -1] = tokens
            self._go_on(step, tokens)

    def _run(self, rows: IntArray, step: int) -> None:
        """Run the next block, no longer than the rows need and the longest one has room for."""
        if self._block.size:
            last = self._block[:, -1]
            self._fed = np.where(last < 0, -1 - last, last)
        room = self._capacity - int(self._lengths.max()) - step + 1
        count = max(1, min(self._loop.steps, self._sampler.remaining(rows, step), room))
        if 2 * self._num_uncertain > self._draws:
            count = 1  # If the host samples most tokens, the steps after them are mostly wasted.
        request = self._sampler.request(step, self._vocab_size)
        self._block = self._loop.run(self._state, count, request, self._sampler.draws(step, count))
        self._column, self._first = 0, step

    def _logits(self) -> FloatArray:
        """The logits from which the token of the current column was sampled."""
        step = self._first + self._column
        if step == 0:
            logits: FloatArray = self._loop.prompt_logits(self._state)
            return logits
        if self._column < self._block.shape[1] - 1:
            # They are overwritten; repeat the step.
            fed = self._fed if self._column == 0 else self._block[:, self._column - 1]
            self._loop.seek(self._state, self._lengths + step - 1, np.where(fed < 0, -1 - fed, fed))
            self._loop.run(self._state, 1, self._sampler.request(step, self._vocab_size), self._sampler.draws(step, 1))
        logits = self._loop.logits(self._state)
        return logits

    def _go_on(self, step: int, tokens: IntArray) -> None:
        """Make the device continue with `tokens`, sampled at `step`."""
        self._loop.seek(self._state, self._lengths + step, tokens)
