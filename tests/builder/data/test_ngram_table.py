"""The n-gram table: what is counted, what is kept, and what its file is."""

from __future__ import annotations

import struct
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from builder.data.ngram_table import count_ngrams
from serving.bundle import open_bundle
from serving.errors import BundleError
from serving.generation.ngram_table import MAGIC, NgramTable, context_key, context_keys, load_ngram_table
from tests.closed_form import write_bundle


def counted(tokens: list[int]) -> dict[tuple[int, ...], tuple[int, float]]:
    """Each kept context's token and confidence, by dictionaries."""
    following: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for length in range(1, 5):
        for end in range(length, len(tokens)):
            following[tuple(tokens[end - length : end])][tokens[end]] += 1
    found = {}
    for context, counts in following.items():
        token, count = min(counts.items(), key=lambda pair: (-pair[1], pair[0]))
        confidence = (count - 0.5) / (sum(counts.values()) + 0.5)
        if count >= 2 and confidence >= 0.3:
            found[context] = token, confidence
    return found


def test_the_table_is_what_dictionaries_count() -> None:
    rng = np.random.default_rng(0)
    tokens = np.cumsum(rng.integers(0, 3, 3000)) % 17
    table = count_ngrams(tokens.astype(np.uint16), 17)
    wanted = counted(tokens.tolist())
    assert len(table) == len(wanted) > 300
    for context, (token, confidence) in wanted.items():
        (drafted, *_), (share, *_) = table.continuation(context, 1)
        # A longer context is looked up first; here there is none before it.
        assert drafted == token and share == pytest.approx(confidence, abs=1 / 255)


def test_the_longest_known_context_decides_and_the_draft_feeds_itself() -> None:
    tokens = np.array(([1, 2, 3, 4, 5, 6] * 4 + [9, 2, 3, 8] * 4), np.uint16)
    table = count_ngrams(tokens, 10)
    assert table.continuation([1, 2, 3], 4)[0] == (4, 5, 6, 1)
    assert table.continuation([9, 2, 3], 2)[0] == (8, 9)
    assert table.continuation([7], 3) == ((), ())
    assert table.continuation([], 3) == ((), ())


def test_the_most_frequent_entries_are_kept() -> None:
    tokens = np.array([1, 2] * 50 + [3, 4] * 3 + [5, 6] * 2, np.uint16)
    table = count_ngrams(tokens, 7, max_entries=4)
    assert len(table) == 4
    assert table.continuation([1], 1)[0] == (2,) and table.continuation([5], 1)[0] == ()


@pytest.mark.parametrize("length", range(6))
def test_short_texts(length: int) -> None:
    assert len(count_ngrams(np.arange(length), 6)) == 0


def test_keys() -> None:
    tokens = np.array([7, 0, 50256, 3, 9], np.uint64)
    for length in range(1, 5):
        keys = context_keys(tokens, length)
        assert keys.tolist() == [context_key(tokens[i : i + length].tolist()) for i in range(6 - length)]
    assert context_key([0]) != context_key([0, 0])


def test_the_file_reads_back(tmp_path: Path) -> None:
    table = count_ngrams(np.arange(1000) % 13, 257)
    write_bundle(tmp_path / "with", extra={"ngrams.bin": table.to_bytes()})
    write_bundle(tmp_path / "without")
    read = load_ngram_table(open_bundle(tmp_path / "with"))
    assert read is not None and len(read) == len(table) > 0
    assert read.continuation([4, 5], 3) == table.continuation([4, 5], 3)
    assert load_ngram_table(open_bundle(tmp_path / "without")) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        MAGIC,
        b"other001" + struct.pack("<II", 257, 0),
        MAGIC + struct.pack("<II", 257, 2**32 - 1),
        MAGIC + struct.pack("<II", 257, 1),
        MAGIC + struct.pack("<II", 257, 1) + struct.pack("<QIB", 5, 257, 255),
        MAGIC + struct.pack("<II", 257, 2) + struct.pack("<QQIIBB", 5, 5, 1, 1, 255, 255),
        MAGIC + struct.pack("<II", 258, 1) + struct.pack("<QIB", 5, 257, 255),
        count_ngrams(np.arange(1000) % 13, 257).to_bytes() + b"\0",
    ],
)
def test_a_malformed_file_is_refused_in_one_line(data: bytes, tmp_path: Path) -> None:
    write_bundle(tmp_path / "tiny", extra={"ngrams.bin": data})
    with pytest.raises(BundleError, match=r"ngrams\.bin.*build the bundle again"):
        load_ngram_table(open_bundle(tmp_path / "tiny"))


def test_an_empty_table_drafts_nothing() -> None:
    table = NgramTable(5, np.empty(0, np.uint64), np.empty(0, np.uint32), np.empty(0, np.uint8))
    assert NgramTable.from_bytes(table.to_bytes(), "x").continuation([1, 2], 3) == ((), ())
