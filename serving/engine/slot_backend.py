"""What the engine needs of a runtime: slots of cache that prompts are read into, piece by piece, and rows that decode.

A slot is one row of a cache [slots, heads, max_length, head_dim]. The rows that decode are always the leading ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeGuard

import numpy as np

from serving.backends.base import Choice, FloatArray, IntArray, Request
from serving.bundle import Geometry

SCORED_BYTES = 32 << 20
"""Memory for the logits of one chunk of a prompt that is scored, unless three tokens need more."""


class SlotBackend(Protocol):
    """One graph of one bundle, loaded, with its cache. Used by one thread at a time.

    The caller keeps count of what each slot holds: a position is overwritten by whoever writes it next, and nothing
    behind the positions that a call is told of is ever looked at.
    """

    name: str
    vocab_size: int
    n_positions: int
    slots: int
    max_length: int
    """Positions of a slot, at most `n_positions`."""
    copies: bool
    """Whether `copy_prefix` may be called."""
    cache_bytes: int
    """What the whole cache takes, once every position was written."""
    scored_tokens: int
    """Tokens that one `score_chunk` may take, at least 3; 0 where it may not be called."""

    def prefill_chunk(self, slot: int, tokens: Sequence[int], start: int) -> FloatArray:
        """Append `tokens` (at least one) behind the first `start` positions of `slot`; the logits after the last of
        them, [vocab_size] float32. The next call may write into the same memory.

        What is written, and the logits, depend on nothing but the tokens, and on which of them were pieces of a single
        token: the same bits in any slot, beside any company, wherever else a prompt is cut.
        """
        ...

    def score_chunk(self, slot: int, tokens: Sequence[int], start: int) -> FloatArray:
        """Write what `prefill_chunk` writes, to the bit; the logits after each of the tokens, [tokens, vocab_size]
        float32. The next call may write into the same memory.
        """
        ...

    def decode(self, tokens: IntArray, lengths: IntArray) -> FloatArray:
        """Append one token to each of the leading rows; `tokens` and `lengths`, the positions that a row has by now,
        are [rows]. The logits after it, [rows, vocab_size] float32, which the caller may change until the next call.
        """
        ...

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Make the first `length` positions of `target` those of `source`, another slot."""
        ...

    def close(self) -> None:
        """Give the cache and the graph back. May be called more than once."""
        ...


class ChoosingSlotBackend(SlotBackend, Protocol):
    """A backend that can choose tokens where the logits are, so that no logits need to be fetched."""

    chooses: bool
    """Whether to have it choose; if not, the methods below may not be called."""

    def advance(self, tokens: IntArray, lengths: IntArray) -> None:
        """Append one token to each of the leading rows as `decode` does, and leave the logits where they are."""
        ...

    def choose(self, request: Request) -> Choice:
        """Choose the next token of each row of the last `advance`; what is asked holds for as many rows."""
        ...

    def logits(self) -> FloatArray:
        """Fetch the logits of the last `advance`, [rows, vocab_size], which the caller may change until the next."""
        ...


def chooses(backend: SlotBackend) -> TypeGuard[ChoosingSlotBackend]:
    """Whether to have `backend` choose tokens itself."""
    return bool(getattr(backend, "chooses", False))


def scored_tokens(vocab_size: int, max_length: int) -> int:
    """How many tokens' logits fit into SCORED_BYTES, from 3 to `max_length`."""
    return max(3, min(max_length, SCORED_BYTES // (4 * vocab_size)))


def cache_bytes(geometry: Geometry, slots: int, max_length: int, dtype: str = "float32") -> int:
    """Bytes of keys and values of all blocks: 2 * n_layer * slots * width * max_length * size of `dtype`.

    The width is n_embd, with each head's size rounded up to a multiple of 8.
    """
    width = geometry.n_head * geometry.padded_head_dim
    return 2 * geometry.n_layer * slots * width * max_length * np.dtype(dtype).itemsize
