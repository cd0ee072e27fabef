"""A byte-level BPE as arrays: what the graph tokenizer of the SavedModel looks up.

Everything is read from the tokenizer and the `tokenizers` library themselves: which characters are letters, numbers and
white space is asked of the library's own regular expressions, so that no other Unicode version can slip in.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, pre_tokenizers

from builder.data.tokenizer import can_cut, vocabulary_size
from serving.sampling.detokenizer import BYTE_ALPHABET, TokenBytes

OTHER, LETTER, NUMBER, SPACE = range(4)
_PATTERNS = {LETTER: r"\p{L}+", NUMBER: r"\p{N}+", SPACE: r"\s+"}
# Planes 4 to 13 hold no characters, 15 and 16 private ones: none of the three.
_PLANES = (range(0x40000), range(0xE0000, 0xF0000))
_SURROGATES = range(0xD800, 0xE000)


@dataclass(frozen=True)
class BytePairTables:
    """Arrays over a byte-level BPE.

    Code points from `class_starts[i]` up to the next start are of `classes[i]`. `byte_ids` [256] are the tokens of
    single bytes. The merges are sorted by key, left id * `base` + right id: `pair_keys`, `pair_ranks`, `pair_results`
    (the merged id), all [merges]. `pair_together` is False for a merge whose result takes part in a merge of a lower
    rank: its occurrences in a word must be merged one at a time. `added` are the added tokens' texts and ids,
    `token_bytes` the bytes that each id decodes to, and `longest` the bytes of text that one token stands for at most.
    """

    class_starts: NDArray[np.int32]
    classes: NDArray[np.int32]
    byte_ids: NDArray[np.int32]
    base: int
    pair_keys: NDArray[np.int64]
    pair_ranks: NDArray[np.int32]
    pair_results: NDArray[np.int32]
    pair_together: NDArray[np.bool_]
    added: dict[str, int]
    token_bytes: list[bytes]
    longest: int


def problem(tokenizer: Tokenizer) -> str | None:
    """Why the graph cannot reproduce this tokenizer, in a few words; None if it can."""
    state: dict[str, Any] = json.loads(tokenizer.to_str())
    model, added = state["model"], state["added_tokens"]
    if model.get("type") != "BPE":
        return "it is not a BPE"
    if not can_cut(tokenizer):
        return "it has a normalizer, another pre-tokenizer than GPT-2's, or an added token that takes white space"
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(key):
            return f"its model sets {key}"
    if (state["decoder"] or {}).get("type") != "ByteLevel":
        return "its decoder is not ByteLevel"
    if not BYTE_ALPHABET.keys() <= model["vocab"].keys():
        return "its vocabulary lacks some of the 256 bytes"
    if any(token["single_word"] for token in added):
        return "an added token matches whole words only"
    texts = [token["content"] for token in added]
    if any(_overlap(first, second) for first, second in product(texts, texts)):
        return "its added tokens may overlap"
    return None


def byte_pair_tables(tokenizer: Tokenizer, vocab_size: int) -> BytePairTables:
    """Return the tables of a tokenizer that has no `problem`; `vocab_size` is the model's, at least the tokenizer's."""
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    size = max(vocab_size, vocabulary_size(tokenizer))
    ranks: dict[tuple[int, int], int] = {}
    results: list[int] = []
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks[vocab[left], vocab[right]] = rank  # Of a pair that stands there twice, the library keeps the last.
        results.append(vocab[left + right])
    pairs = sorted(ranks)
    first_use: dict[int, int] = {}
    for pair, rank in ranks.items():
        for part in pair:
            first_use[part] = min(rank, first_use.get(part, rank))
    starts, classes = character_classes()
    added = {token.content: id for id, token in tokenizer.get_added_tokens_decoder().items()}
    decoded = TokenBytes(tokenizer)
    token_bytes = [decoded[id] for id in range(size)]
    return BytePairTables(
        class_starts=starts,
        classes=classes,
        byte_ids=np.array([vocab[letter] for letter in sorted(BYTE_ALPHABET, key=BYTE_ALPHABET.__getitem__)], np.int32),
        base=size,
        pair_keys=np.array([left * size + right for left, right in pairs], np.int64),
        pair_ranks=np.array([ranks[pair] for pair in pairs], np.int32),
        pair_results=np.array([results[ranks[pair]] for pair in pairs], np.int32),
        pair_together=np.array(
            [first_use.get(results[ranks[pair]], ranks[pair] + 1) > ranks[pair] for pair in pairs], np.bool_
        ),
        added=added,
        token_bytes=token_bytes,
        longest=max(map(len, [*token_bytes, *(text.encode("utf-8") for text in added)])),
    )


@functools.cache
def character_classes() -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The first code point of each run of code points of one class, and the class, in order from 0."""
    points = np.array([point for plane in _PLANES for point in plane if point not in _SURROGATES], np.int32)
    text = "".join(map(chr, points.tolist()))
    classes = np.full(0x110000, OTHER, np.int32)
    for kind, pattern in _PATTERNS.items():
        matched = np.ones(len(text), np.bool_)
        for _, (start, end) in pre_tokenizers.Split(Regex(pattern), "removed").pre_tokenize_str(text):
            matched[start:end] = False
        classes[points[matched]] = kind
    starts = np.flatnonzero(np.diff(classes, prepend=-1)).astype(np.int32)
    return starts, classes[starts]


def _overlap(first: str, second: str) -> bool:
    """Whether two occurrences can share a character: the end of one begins the other, or one holds the other."""
    if first != second and first in second:
        return True
    return any(second.startswith(first[-size:]) for size in range(1, min(len(first), len(second))))
