"""Sampling of a batch's next tokens: on the host, from fetched logits, or on the device.

Both give the same tokens. Device sampling fetches logits only for rows whose token is not certain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeGuard

import numpy as np

from serving.backends.base import (
    Backend,
    DeviceSamplingBackend,
    FloatArray,
    IntArray,
    SamplingRequest,
    SpeculativeBackend,
)
from serving.generation.multi_step_decode import MultiStepSteps
from serving.generation.speculative_decode import SpeculativeSteps
from serving.sampling import SamplingParams, SamplingRows, sample_tokens, uniform
from serving.sampling.constraints import TokenConstraint, sample_allowed
from serving.sampling.penalties import PenaltyState

# Top candidates on the device of a row without top-k, and the maximum for a row with it.
USUAL_CANDIDATES = 256
MAX_CANDIDATES = 1024


class Steps(Protocol):
    """A running batch. Ended rows still get input, of any value."""

    def sample_tokens(self, rows: IntArray, step: int) -> IntArray:
        """The next tokens, [all rows], valid for `rows`; `step` counts from 0."""
        ...

    def feed(self, tokens: IntArray) -> None:
        """Append `tokens`, [all rows], to the rows."""
        ...


def open_steps(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    capacity: int,
    eos_token_id: int | None = None,
) -> Steps:
    """Prefill `prompts`, each with its own `params`, and sample where it is fastest for them."""
    sampler = BatchSampler(prompts, params, eos_token_id)
    loop = backend.loop(sampler.samples) if hasattr(backend, "loop") and sampler.supports_multi_step else None
    if loop is not None:
        return MultiStepSteps(loop, backend.vocab_size, sampler, prompts, capacity)
    if supports_speculation(backend) and len(prompts) == 1:
        return SpeculativeSteps(backend, sampler, prompts[0], params[0], capacity)
    # On a CPU the host reads the logits in place and is faster (docs/decisions/sampling.md).
    if supports_device_sampling(backend) and backend.device != "cpu":
        return DeviceSteps(backend, sampler, prompts, capacity)
    return HostSteps(backend, sampler, prompts, capacity)


def open_host_steps(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    capacity: int,
    eos_token_id: int | None,
    constraint: TokenConstraint | None,
) -> HostSteps | SpeculativeSteps:
    """Prefill `prompts` and sample on the host, where each step's logits are; no speculation under a `constraint`."""
    sampler = BatchSampler(prompts, params, eos_token_id, constraint)
    if constraint is None and supports_speculation(backend) and len(prompts) == 1:
        return SpeculativeSteps(backend, sampler, prompts[0], params[0], capacity)
    return HostSteps(backend, sampler, prompts, capacity)


def supports_speculation(backend: Backend) -> TypeGuard[SpeculativeBackend]:
    """Whether `backend` can verify drafts."""
    return getattr(backend, "verify_step", None) is not None


def supports_device_sampling(backend: Backend) -> TypeGuard[DeviceSamplingBackend]:
    """Whether `backend` can sample on the device."""
    return bool(getattr(backend, "supports_device_sampling", False))


class BatchSampler:
    """Sampling parameters of a batch as arrays, with the state of its penalties."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        eos_token_id: int | None = None,
        constraint: TokenConstraint | None = None,
    ) -> None:
        self._params, self._constraint = params, constraint
        self._sampling = SamplingRows.of(params)
        self._seed = np.array([each.seed for each in params], np.int64)
        self._penalty_state = PenaltyState(prompts, params, eos_token_id)
        self._budgets = np.array([each.max_new_tokens for each in params], np.int64)
        sampled = ~self._sampling.greedy
        self.samples = bool(sampled.any())
        """Whether any row is not greedy."""
        top_k = self._sampling.top_k
        wanted = np.where(top_k > 0, top_k, USUAL_CANDIDATES)[sampled]
        self._candidates = min(int(wanted.max(initial=1)), MAX_CANDIDATES)
        self.supports_multi_step = self._penalty_state.empty and self._candidates <= USUAL_CANDIDATES
        """Whether multi-step decode can run: no step depends on earlier tokens except by the KV cache."""

    def sample_tokens(self, logits: FloatArray, rows: IntArray, step: int) -> IntArray:
        """Sample the next tokens of `rows` on the host from `logits`, [len(rows), vocab_size]."""
        logits = self.edited(logits, rows)
        if self._constraint is not None:
            params = self._params[0]
            token = sample_allowed(logits[0], self._constraint.allowed(), params, params.seed, step)
            return np.array([token], np.int64)
        sampling = self._sampling.take(rows).arrays()
        return sample_tokens(logits, seed=self._seed[rows], step=np.full(len(rows), step), **sampling)

    def edited(self, logits: FloatArray, rows: IntArray) -> FloatArray:
        """`logits`, [len(rows), vocab_size], with bias and penalties of `rows`; a copy if they change anything."""
        if self._penalty_state.empty:
            return logits
        return self._penalty_state.logits_processor.apply(logits, rows)

    def request(self, step: int, vocab_size: int) -> SamplingRequest:
        """The parameters for a backend that samples."""
        draw = uniform(self._seed, np.full(len(self._seed), step))
        few = min(self._candidates, vocab_size)
        logits_processor = self._penalty_state.logits_processor
        return SamplingRequest(self._sampling, draw, logits_processor, few)

    def draws(self, step: int, count: int) -> FloatArray:
        """The random numbers of `count` steps from `step` on, [rows, count]."""
        rows = len(self._seed)
        steps = np.arange(step, step + count)
        numbers = uniform(np.repeat(self._seed, count), np.tile(steps, rows))
        return np.asarray(numbers, np.float32).reshape(rows, count)

    def remaining(self, rows: IntArray, step: int) -> int:
        """Maximum number of tokens that any of `rows` may still get, before `step`."""
        return int(self._budgets[rows].max()) - step

    def add(self, rows: IntArray, tokens: IntArray) -> None:
        """Record the new tokens of `rows`; `tokens` is [all rows]."""
        if not self._penalty_state.empty:
            for row in rows.tolist():
                self._penalty_state.add(row, int(tokens[row]))
        if self._constraint is not None:
            self._constraint.accept(int(tokens[0]))


class HostSteps:
    """Samples on the host: the logits are fetched at each step."""

    def __init__(
        self, backend: Backend, sampler: BatchSampler, prompts: Sequence[Sequence[int]], capacity: int
    ) -> None:
        self._backend, self._sampler = backend, sampler
        self._state, self.logits = backend.prefill(prompts, capacity)
        """[all rows, vocab_size], before bias and penalties; `feed` overwrites them."""

    def sample_tokens(self, rows: IntArray, step: int) -> IntArray:
        """See `Steps.sample_tokens`."""
        tokens = np.zeros(len(self.logits), np.int64)
        tokens[rows] = self._sampler.sample_tokens(self.logits[rows], rows, step)
        self._sampler.add(rows, tokens)
        return tokens

    def feed(self, tokens: IntArray) -> None:
        """See `Steps.feed`."""
        self.logits = self._backend.decode(self._state, tokens)


class DeviceSteps:
    """Samples on the device: logits are fetched only for rows whose token is not certain."""

    def __init__(
        self, backend: DeviceSamplingBackend, sampler: BatchSampler, prompts: Sequence[Sequence[int]], capacity: int
    ) -> None:
        self._backend, self._sampler = backend, sampler
        self._state: Any = backend.open(prompts, capacity)

    def sample_tokens(self, rows: IntArray, step: int) -> IntArray:
        """See `Steps.sample_tokens`."""
        sampled = self._backend.sample_tokens(self._state, self._sampler.request(step, self._backend.vocab_size))
        tokens, uncertain = sampled.tokens.copy(), rows[~sampled.exact[rows]]
        if uncertain.size:
            tokens[uncertain] = self._sampler.sample_tokens(
                self._backend.logits(self._state)[uncertain], uncertain, step
            )
        self._sampler.add(rows, tokens)
        return tokens

    def feed(self, tokens: IntArray) -> None:
        """See `Steps.feed`."""
        self._backend.advance(self._state, tokens)
