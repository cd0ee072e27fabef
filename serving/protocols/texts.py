"""Texts to token ids and back: bounded before any work, and in slices on threads that do nothing else.

A slice is a job of its own, so that callers take turns, and what is left of a call whose client went away is dropped.
Prompts have other threads than calls that only ask for tokens, so that the one cannot hold the other.
"""

from __future__ import annotations

import asyncio
import functools
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from tokenizers import Tokenizer, pre_tokenizers

from serving.errors import InputError
from serving.sampling.detokenizer import longest_token

LONG_TEXT = 2048
"""Characters, or ids, from which on the work is done in another thread, so that streams under way do not wait."""
MAX_BYTES = 262_144
"""Of all texts of a call that asks for tokens alone."""
_SLICE = 16_384
"""Characters that a slice has, or a little more."""
_STRETCH = 65_536
"""Characters that a slice may have where a text has no place to cut it."""
PROMPTS = ThreadPoolExecutor(2, thread_name_prefix="prompts")
TOKENS = ThreadPoolExecutor(1, thread_name_prefix="tokens")
# No piece of a byte-level BPE's text reaches over a single space, or the end of a line, between two letters or digits.
_PLACE = re.compile(r"(?<=[^\W_])[ \n](?=[^\W_])")


async def encode_prompts(
    tokenizer: Tokenizer, texts: Sequence[str], n_positions: int, beside: bool = False
) -> list[list[int]]:
    """Token ids of each text; in another thread if they are long, or `beside`.

    Raises InputError for a text that has too many bytes for `n_positions` tokens, before anything is encoded.
    """
    if sum(map(len, texts)) <= LONG_TEXT and not beside:
        return _encode(tokenizer, texts)
    longest = await asyncio.to_thread(longest_token, tokenizer)
    for text in texts:
        # No text of more bytes can have few enough tokens.
        if len(text) > n_positions * longest or _size(text) > n_positions * longest:
            raise TooLongError(f"a prompt of {len(text)} characters has more than {n_positions} tokens")
    return await _encode_slices(PROMPTS, tokenizer, texts)


async def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts of any number of tokens, for a call that wants nothing else.

    Raises InputError for more than MAX_BYTES bytes together, and for a long stretch without any place to cut it.
    """
    size = 0
    for text in texts:
        size += len(text) if size + len(text) > MAX_BYTES else _size(text)
        if size > MAX_BYTES:
            raise InputError(f"the text has more than {MAX_BYTES} bytes; send it in parts")
    if size <= LONG_TEXT:
        return _encode(tokenizer, texts)
    return await _encode_slices(TOKENS, tokenizer, texts)


async def decode(tokenizer: Tokenizer, rows: Sequence[Sequence[int]], special: bool = False) -> list[str]:
    """The text of each row of token ids; special tokens have text if `special`."""

    def work() -> list[str]:
        texts: list[str] = tokenizer.decode_batch(list(rows), skip_special_tokens=not special)
        return texts

    if sum(map(len, rows)) <= LONG_TEXT:
        return work()
    return await asyncio.get_running_loop().run_in_executor(TOKENS, work)


class TooLongError(InputError):
    """A prompt has more tokens than the model's context."""


async def _encode_slices(pool: ThreadPoolExecutor, tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    loop = asyncio.get_running_loop()
    result: list[list[int]] = [[] for _ in texts]
    can_cut = cuttable(tokenizer)
    for rows, batch in _batches(texts, can_cut):
        if pool is TOKENS and max(map(len, batch)) > _STRETCH:
            raise InputError(f"the text has {_STRETCH} characters with no space between words; send it in parts")
        encoded = await loop.run_in_executor(pool, _encode, tokenizer, batch)
        for row, ids in zip(rows, encoded, strict=True):
            result[row] += ids
    return result


def _batches(texts: Sequence[str], can_cut: bool) -> Iterator[tuple[list[int], list[str]]]:
    """Texts, or slices of them, with the numbers of their rows, in batches of about a slice."""
    rows: list[int] = []
    batch: list[str] = []
    size = 0
    for row, text in enumerate(texts):
        for piece in _slices(text) if can_cut else [text]:
            rows.append(row)
            batch.append(piece)
            size += len(piece)
            if size >= _SLICE:
                yield rows, batch
                rows, batch, size = [], [], 0
    if batch:
        yield rows, batch


def _slices(text: str) -> Iterator[str]:
    begin = 0
    while place := _PLACE.search(text, begin + _SLICE):
        yield text[begin : place.start()]
        begin = place.start()
    yield text[begin:]


@functools.lru_cache(maxsize=8)
def cuttable(tokenizer: Tokenizer) -> bool:
    """Whether a text may be cut before a space between words: it has GPT-2's rule for words and nothing around it."""
    rule = tokenizer.pre_tokenizer
    added = tokenizer.get_added_tokens_decoder().values()
    return (
        isinstance(rule, pre_tokenizers.ByteLevel)
        and rule.use_regex
        and not rule.add_prefix_space
        and tokenizer.normalizer is None
        and tokenizer.truncation is None
        and not any(token.lstrip or token.rstrip or token.single_word for token in added)
        and not any(len(token.content.split()) != 1 or token.content != token.content.strip() for token in added)
    )


def _size(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    # By the batch, for which alone the tokenizer lets go of the interpreter.
    return [item.ids for item in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
