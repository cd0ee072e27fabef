"""The interface of every runtime: a prefill that opens a batch of sequences, and a decode step that extends them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from serving.errors import InputError
from serving.sampling.parameters import SamplingRows
from serving.sampling.penalties import LogitsProcessor

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


class Backend(Protocol):
    """One graph of one bundle, loaded in one runtime.

    The opaque state that `prefill` returns and `decode` advances holds the KV cache. A state belongs to the backend
    that created it and is used by one thread at a time.
    """

    name: str
    vocab_size: int
    n_positions: int

    def prefill(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[Any, FloatArray]:
        """Run `prompts` (each of 1 to `capacity` token ids, lengths may differ) and return (state, logits).

        `capacity` is the number of positions each row may reach, at most `n_positions`. `logits` is
        [len(prompts), vocab_size] float32: each row's logits at its own last prompt token.
        """
        ...

    def decode(self, state: Any, tokens: IntArray) -> FloatArray:
        """Append one token id a row (`tokens` is [rows]) and return the logits after it, [rows, vocab_size].

        The next step of the same state may overwrite the result.
        Raises InputError if a row is already at its capacity.
        """
        ...


@dataclass
class SamplingRequest:
    """The sampling parameters of each row of a batch; `draw` [rows] is a random number in [0, 1).

    `candidates` is the number of top candidates among which the token is searched.
    """

    sampling: SamplingRows
    draw: FloatArray
    logits_processor: LogitsProcessor
    candidates: int


@dataclass
class SampledTokens:
    """The sampled tokens, [rows], and whether each is certainly the token that the host would sample, [rows]."""

    tokens: IntArray
    exact: BoolArray


class DeviceSamplingBackend(Backend, Protocol):
    """A backend that can sample on the device, so that no logits are fetched.

    `open` and `advance` are `prefill` and `decode` without the transfer of logits.
    """

    supports_device_sampling: bool
    """Whether it can; if not, the methods below may not be called."""
    device: str
    """Where it runs: "cpu" or "cuda"."""

    def open(self, prompts: Sequence[Sequence[int]], capacity: int) -> Any:
        """Run `prompts` as `prefill` does and return the state."""
        ...

    def advance(self, state: Any, tokens: IntArray) -> None:
        """Append one token id a row as `decode` does."""
        ...

    def sample_tokens(self, state: Any, request: SamplingRequest) -> SampledTokens:
        """Sample the next token of each row from its last logits."""
        ...

    def logits(self, state: Any) -> FloatArray:
        """Fetch the last logits, [rows, vocab_size]; the next step may overwrite them."""
        ...


class NextTokens(Protocol):
    """A table of likely next tokens."""

    def continuation(self, tokens: Sequence[int], count: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Up to `count` tokens that follow `tokens`, and the confidence of each given those before it."""
        ...


@dataclass(frozen=True)
class VerifyStep:
    """How a backend verifies drafts: a step over several tokens of one sequence that gives the logits after each.

    `tolerance` is how far these logits may be from those of single-token steps, as a share of their spread
    (`serving.sampling.certainty.logit_scale`); 0 stands for equal bits. A step takes up to `tokens`, and
    1 + base_cost + token_cost * drafted tokens times as long as a single-token step.
    """

    tokens: int
    tolerance: float
    base_cost: float
    token_cost: float


class SpeculativeBackend(Backend, Protocol):
    """A backend that can verify drafted tokens of a single sequence."""

    verify_step: VerifyStep | None
    """None where drafts are not to be verified; the methods below may then not be called."""
    draft_table: NextTokens | None
    """Likely next tokens, for drafts; None without such a table."""
    pacing: Any
    """A `serving.generation.pacing.Pacing`, which all its sequences share; None before the first one."""

    def verify(self, state: Any, tokens: IntArray) -> FloatArray:
        """Append `tokens` (2 to `verify_step.tokens`) to the only row; the logits after each, [tokens, vocab_size].

        The next call with the same state may overwrite the result.
        """
        ...

    def rewind(self, state: Any, length: int) -> None:
        """Forget all positions of the only row from `length` on."""
        ...


def pad_right(prompts: Sequence[Sequence[int]]) -> tuple[IntArray, IntArray]:
    """Return token ids [rows, longest], padded on the right with id 0, and lengths [rows]."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int64)
    token_ids = np.zeros((len(prompts), int(lengths.max())), np.int64)
    for row, prompt in enumerate(prompts):
        token_ids[row, : len(prompt)] = prompt
    return token_ids, lengths


def check_capacity(prompts: Sequence[Sequence[int]], capacity: int, n_positions: int) -> None:
    """Raise InputError unless every prompt holds 1 to `capacity` tokens and `capacity` fits the context."""
    if not prompts:
        raise InputError("no prompts; give at least one")
    if capacity > n_positions:
        raise InputError(f"a capacity of {capacity} does not fit the context of {n_positions} tokens")
    for index, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= capacity:
            raise InputError(f"prompt {index} has {len(prompt)} tokens; it must have from 1 to {capacity}")


def check_room(lengths: IntArray, capacity: int) -> None:
    """Raise InputError if a row has reached its capacity."""
    full = np.flatnonzero(lengths >= capacity)
    if full.size:
        raise InputError(f"row {full[0]} has reached its capacity of {capacity} tokens; prefill with a larger one")
