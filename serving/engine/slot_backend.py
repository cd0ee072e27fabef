"""The engine's interface to a runtime: slots of KV cache, chunked prefill into one slot, a decode step over many.

A slot is one row of a KV cache [slots, heads, max_length, head_dim]. A decode step always runs the leading rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeGuard

import numpy as np

from serving.backends.base import FloatArray, IntArray, SampledTokens, SamplingRequest, VerifyStep
from serving.bundle import Geometry

SCORED_BYTES = 32 << 20
"""Memory for the logits of one chunk of a prompt that is scored, unless three tokens need more."""


class SlotBackend(Protocol):
    """One graph of one bundle, loaded, with its cache. Used by one thread at a time.

    The caller tracks what each slot holds. A write to a position overwrites it, and no call reads positions beyond the
    ones it is given.
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
    """Bytes of the whole KV cache."""
    scored_tokens: int
    """Tokens that one `score_chunk` may take, at least 3; 0 where it may not be called."""
    verify_step: VerifyStep | None
    """How `verify` compares with `decode`; None where it may not be called."""

    def prefill_chunk(self, slot: int, tokens: Sequence[int], start: int) -> FloatArray:
        """Append `tokens` (at least one) after the first `start` positions of `slot`; the logits after the last of
        them, [vocab_size] float32. The next call may write into the same memory.

        The KV cache and the logits depend only on the tokens, and on which chunks had a single token. They have the
        same bits in any slot, for any load, and for any other division of a prompt into chunks.
        """
        ...

    def score_chunk(self, slot: int, tokens: Sequence[int], start: int) -> FloatArray:
        """Write what `prefill_chunk` writes, to the bit; the logits after each of the tokens, [tokens, vocab_size]
        float32. The next call may write into the same memory.
        """
        ...

    def verify(self, slot: int, tokens: Sequence[int], start: int) -> FloatArray:
        """Append `tokens` (2 to `verify_step.tokens`) after the first `start` positions of `slot`, as `decode` does one
        by one; the logits after each of them, [tokens, vocab_size] float32, which the caller may change until the next
        call. `verify_step` says how far logits and KV cache may be from those of `decode`.
        """
        ...

    def decode(self, tokens: IntArray, lengths: IntArray) -> FloatArray:
        """Append one token to each of the leading rows; `tokens` and `lengths`, the positions that a row has by now,
        are [rows]. The logits after it, [rows, vocab_size] float32, which the caller may change until the next call.
        """
        ...

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of the slot `source` to the slot `target`."""
        ...

    def close(self) -> None:
        """Release the KV cache and the graph. May be called more than once."""
        ...


class DeviceSamplingSlotBackend(SlotBackend, Protocol):
    """A backend that can sample on the device, so that no logits are fetched."""

    supports_device_sampling: bool
    """Whether it samples; if not, the methods below may not be called."""

    def advance(self, tokens: IntArray, lengths: IntArray) -> None:
        """Append one token to each of the leading rows as `decode` does, and leave the logits on the device."""
        ...

    def sample_tokens(self, request: SamplingRequest) -> SampledTokens:
        """Sample the next token of each row of the last `advance`; `request` has as many rows."""
        ...

    def logits(self) -> FloatArray:
        """Fetch the logits of the last `advance`, [rows, vocab_size], which the caller may change until the next."""
        ...


def supports_device_sampling(backend: SlotBackend) -> TypeGuard[DeviceSamplingSlotBackend]:
    """Whether to have `backend` choose tokens itself."""
    return bool(getattr(backend, "supports_device_sampling", False))


def scored_tokens(vocab_size: int, max_length: int) -> int:
    """How many tokens' logits fit into SCORED_BYTES, from 3 to `max_length`."""
    return max(3, min(max_length, SCORED_BYTES // (4 * vocab_size)))


def cache_bytes(geometry: Geometry, slots: int, max_length: int, dtype: str = "float32") -> int:
    """Bytes of keys and values of all blocks: 2 * n_layer * slots * width * max_length * size of `dtype`.

    The width is n_embd, with each head's size rounded up to a multiple of 8.
    """
    width = geometry.n_head * geometry.padded_head_dim
    return 2 * geometry.n_layer * slots * width * max_length * np.dtype(dtype).itemsize
