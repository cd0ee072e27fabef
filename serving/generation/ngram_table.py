"""The n-gram table of a bundle: the likeliest next token of frequent contexts of the training text, for drafts.

docs/format.md specifies the file. A wrong entry costs a step some time and changes no token.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serving.bundle import Bundle
from serving.errors import BundleError

NGRAM_FILE = "ngrams.bin"
MAGIC = b"gpt2ngr1"
MAX_CONTEXT = 4
"""Tokens of the longest context."""
MAX_TABLE_BYTES = 64 << 20
_LEAST_TOGETHER = 0.15
"""A draft ends where all its tokens are less likely than this to be right."""
_START_BITS = 14
"""Leading bits of a key that say where to search for it."""
_HEADER = struct.Struct("<8sII")
_ENTRY_BYTES = 8 + 4 + 1
_MULTIPLIER = 0x9E3779B97F4A7C15
_LOW = (1 << 64) - 1


def context_key(tokens: Sequence[int]) -> int:
    """The 64-bit key of a context: from its length on, k becomes k * 0x9E3779B97F4A7C15 + token + 1 modulo 2^64."""
    key = len(tokens)
    for token in tokens:
        key = (key * _MULTIPLIER + token + 1) & _LOW
    return key


def context_keys(tokens: NDArray[np.uint64], length: int) -> NDArray[np.uint64]:
    """`context_key` of every `length` consecutive tokens of `tokens` [n], [n - length + 1]."""
    count = max(0, len(tokens) - length + 1)
    keys = np.full(count, length, np.uint64)
    for place in range(length):
        keys *= np.uint64(_MULTIPLIER)
        keys += tokens[place : place + count] + np.uint64(1)
    return keys


class NgramTable:
    """Next tokens by context.

    Args:
        vocab_size: of the model.
        keys: `context_key` of each context, ascending, [entries].
        tokens: the likeliest token after it, [entries].
        confidence: how often that is the next one, in 255ths, [entries].
    """

    def __init__(
        self,
        vocab_size: int,
        keys: NDArray[np.uint64],
        tokens: NDArray[np.uint32],
        confidence: NDArray[np.uint8],
    ) -> None:
        self.vocab_size, self._keys, self._tokens, self._confidence = vocab_size, keys, tokens, confidence
        # Several times as fast as numpy's search and look-up of one key. Keys are hashes, so few have the same start.
        self._sorted: Sequence[int] = np.ascontiguousarray(keys).data
        self._next: Sequence[int] = np.ascontiguousarray(tokens, np.uint32).data
        self._likely: Sequence[int] = np.ascontiguousarray(confidence).data
        starts = np.arange(1 << _START_BITS, dtype=np.uint64) << np.uint64(64 - _START_BITS)
        ends = np.append(np.searchsorted(keys, starts), len(keys))
        self._starts: Sequence[int] = ends.astype(np.uint32).data

    def __len__(self) -> int:
        return len(self._keys)

    def continuation(self, tokens: Sequence[int], count: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """See `serving.backends.base.NextTokens`: each token follows the longest known context before it."""
        context = list(tokens[-MAX_CONTEXT:])
        drafted: list[int] = []
        confidence: list[float] = []
        together = 1.0
        while len(drafted) < count and together > _LEAST_TOGETHER:
            place = self._find(context)
            if place is None:
                break
            drafted.append(self._next[place])
            confidence.append(self._likely[place] / 255)
            together *= confidence[-1]
            context = [*context, drafted[-1]][-MAX_CONTEXT:]
        return tuple(drafted), tuple(confidence)

    def _find(self, context: Sequence[int]) -> int | None:
        for start in range(len(context)):
            key = context_key(context[start:])
            start = key >> (64 - _START_BITS)
            end = self._starts[start + 1]
            place = bisect_left(self._sorted, key, self._starts[start], end)
            if place < end and self._sorted[place] == key:
                return place
        return None

    def to_bytes(self) -> bytes:
        """The table as a file."""
        header = _HEADER.pack(MAGIC, self.vocab_size, len(self))
        columns = self._keys.astype("<u8"), self._tokens.astype("<u4"), self._confidence
        return header + b"".join(column.tobytes() for column in columns)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> NgramTable:
        """Read what `to_bytes` wrote; `where` names the file in errors. Raises BundleError for anything else."""
        if len(data) < _HEADER.size or data[: len(MAGIC)] != MAGIC:
            raise BundleError(f"{where}: not an n-gram table; build the bundle again")
        _, vocab_size, count = _HEADER.unpack_from(data)
        if len(data) != _HEADER.size + count * _ENTRY_BYTES:
            raise BundleError(
                f"{where}: {len(data)} bytes, and {count} entries need {_HEADER.size + count * _ENTRY_BYTES}; "
                "build the bundle again"
            )
        keys = np.frombuffer(data, "<u8", count, _HEADER.size).astype(np.uint64)
        tokens = np.frombuffer(data, "<u4", count, _HEADER.size + 8 * count)
        confidence = np.frombuffer(data, np.uint8, count, _HEADER.size + 12 * count)
        if count and (int(tokens.max()) >= vocab_size or not (keys[1:] > keys[:-1]).all()):
            raise BundleError(f"{where}: keys out of order or tokens outside the vocabulary; build the bundle again")
        return cls(vocab_size, keys, tokens, confidence)


def load_ngram_table(bundle: Bundle) -> NgramTable | None:
    """The table of `bundle`; None if it has none. Raises BundleError for a malformed one, or one of another model."""
    if all(artifact.path != NGRAM_FILE for artifact in bundle.manifest.artifacts):
        return None
    where = str(bundle.folder / NGRAM_FILE)
    table = NgramTable.from_bytes(bundle.read(NGRAM_FILE, MAX_TABLE_BYTES), where)
    if table.vocab_size > bundle.manifest.model.vocab_size:
        raise BundleError(
            f"{where}: its vocabulary has {table.vocab_size} tokens and the model's "
            f"{bundle.manifest.model.vocab_size}; build the bundle again"
        )
    return table
