"""Counts the n-gram table of a bundle from the training tokens: which token follows each frequent context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builder.data.token_shards import open_tokens
from serving.generation.ngram_table import MAX_CONTEXT, NgramTable, context_keys

MAX_ENTRIES = 200_000
"""Entries of a table: 13 bytes each."""
MAX_TOKENS = 2_000_000
"""Tokens that are counted: the first ones of the shard. Bounds memory to about 150 MB."""
_LEAST_COUNT = 2
_PAIR_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_LEAST_CONFIDENCE = 0.3
"""Below it, a step that verifies the token costs more than it saves."""


def count_ngrams(tokens: NDArray[Any], vocab_size: int, max_entries: int = MAX_ENTRIES) -> NgramTable:
    """The table of `tokens` [n]: contexts of 1 to 4 tokens, each with its most frequent next token.

    The confidence of a next token that came c times after a context that came t times is (c - 1/2) / (t + 1/2).
    Contexts whose token came once, or with a confidence below 0.3, are left out. Of the rest, the `max_entries` most
    frequent (context, token) pairs are kept, longer contexts first among equals.
    """
    wide = np.asarray(tokens).astype(np.uint64)
    found = [_frequent(wide, length) for length in range(1, MAX_CONTEXT + 1) if len(wide) > length]
    if not found:
        return NgramTable(vocab_size, np.empty(0, np.uint64), np.empty(0, np.uint32), np.empty(0, np.uint8))
    keys, following, counts, confidence, lengths = (np.concatenate(column) for column in zip(*found, strict=True))
    kept = np.lexsort((keys, -lengths, -counts))[:max_entries]
    # Two contexts of one key would be a coincidence of 64 bits; the first one stays.
    _, unique = np.unique(keys[kept], return_index=True)
    kept = kept[unique]
    in_255ths = np.rint(255 * confidence[kept]).astype(np.uint8)
    return NgramTable(vocab_size, keys[kept], following[kept].astype(np.uint32), in_255ths)


def write_ngram_table(shard: Path, vocab_size: int, path: Path) -> int:
    """Count the shard's tokens, write their table to `path` and return the number of its entries."""
    table = count_ngrams(open_tokens(shard)[:MAX_TOKENS], vocab_size)
    path.write_bytes(table.to_bytes())
    return len(table)


def _frequent(tokens: NDArray[np.uint64], length: int) -> tuple[NDArray[Any], ...]:
    """Key, most frequent next token (the lowest among equals), its count, its confidence and `length`, by context.

    Only of contexts whose token is frequent and certain enough. Sorting one 64-bit key takes a fraction of the time of
    sorting by two, so a pair of context and token has a key too.
    """
    keys, following = context_keys(tokens[:-1], length), tokens[length:]
    pairs = (keys * _PAIR_MULTIPLIER + following) * _PAIR_MULTIPLIER
    order = _order(pairs)
    pairs = pairs[order]
    starts = np.flatnonzero(np.r_[True, pairs[1:] != pairs[:-1]])
    counts = np.diff(np.r_[starts, len(pairs)])
    often = counts >= _LEAST_COUNT
    some, counts = order[starts[often]], counts[often]
    found, following = keys[some], following[some]
    # By context and then by count: the last of each context is its most frequent token.
    order = np.lexsort((-following.astype(np.int64), counts, found))
    order = order[np.flatnonzero(np.r_[found[order][1:] != found[order][:-1], np.ones(min(1, len(order)), np.bool_)])]
    found, following, counts = found[order], following[order], counts[order]
    keys.sort()
    totals = np.searchsorted(keys, found, "right") - np.searchsorted(keys, found, "left")
    confidence = (counts - 0.5) / (totals + 0.5)
    kept = confidence >= _LEAST_CONFIDENCE
    return found[kept], following[kept], counts[kept], confidence[kept], np.full(int(kept.sum()), length)


def _order(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """An order of `keys` [n] that puts equal ones side by side, [n].

    One sort of numbers that are a key's upper bits and its place takes a ninth of an `argsort`. Two keys that differ in
    the lower bits alone, one in about 2^42 pairs of two million keys, may lie mixed, and are then counted in parts.
    """
    bits = np.uint64(max(1, len(keys)).bit_length())
    places = np.arange(len(keys), dtype=np.uint64)
    numbered = (keys >> bits << bits) | places
    numbered.sort()
    return (numbered & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
