"""Texts to token ids in slices: the ids of the whole text, bounds before any work, and nobody waits for another."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from serving.errors import InputError
from serving.protocols import texts
from serving.protocols.texts import MAX_BYTES, PROMPTS, TOKENS, TooLongError, decode, encode_prompts, encode_texts
from tests.closed_form import END, byte_tokenizer
from tests.serving.attacked import Attacked, attacked

TOKENIZER = byte_tokenizer(
    merges=[("h", "e"), ("he", "l"), ("Ġ", "w"), ("Ġ", "Ġ"), ("Ċ", "Ċ"), ("a", "b"), ("ab", "ab")]
)
WORDS = st.sampled_from(
    ["hello", "world", "ab", "abab", " ", "  ", "\n", "\n\n", "'s", "'", ".", "é", "中", "9", "\u00a0", "\x1c", END]
)


@given(st.lists(WORDS, max_size=40).map("".join), st.integers(1, 8))
@settings(derandomize=True, deadline=None, max_examples=400)
def test_slices_have_the_ids_of_the_whole_text(text: str, size: int) -> None:
    before, texts._SLICE = texts._SLICE, size
    try:
        pieces = list(texts._slices(text))
        (ids,) = asyncio.run(texts._encode_slices(PROMPTS, TOKENIZER, [text]))
    finally:
        texts._SLICE = before
    assert "".join(pieces) == text
    assert ids == TOKENIZER.encode(text, add_special_tokens=False).ids


def test_a_long_text_is_cut() -> None:
    text = "hello world\nab " * 10_000
    assert len(list(texts._slices(text))) > 5
    assert texts.cuttable(TOKENIZER)
    encoded = asyncio.run(encode_prompts(TOKENIZER, [text, "ab", text], len(text)))
    assert encoded == [TOKENIZER.encode(each, add_special_tokens=False).ids for each in (text, "ab", text)]


def other(change: str) -> Tokenizer:
    tokenizer = byte_tokenizer()
    if change == "added":
        tokenizer.add_tokens([AddedToken("two words", special=False)])
    elif change == "strip":
        tokenizer.add_tokens([AddedToken("<x>", lstrip=True)])
    elif change == "normalizer":
        tokenizer.normalizer = normalizers.NFKC()
    elif change == "truncation":
        tokenizer.enable_truncation(4)
    elif change == "prefix":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return tokenizer


@pytest.mark.parametrize("change", ["added", "strip", "normalizer", "truncation", "prefix", "regex"])
def test_texts_of_other_tokenizers_are_not_cut(change: str) -> None:
    assert not texts.cuttable(other(change))


def test_what_is_too_long_is_refused_before_it_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_encode", lambda *_: pytest.fail("encoded"))
    for work, kind in (
        (encode_prompts(TOKENIZER, ["short", "a" * 20_000], 1024), TooLongError),
        (encode_texts(TOKENIZER, ["a" * MAX_BYTES, "b"]), InputError),
        (encode_texts(TOKENIZER, ["é" * (MAX_BYTES // 2 + 1)]), InputError),
        (encode_texts(TOKENIZER, ["a" * 100_000]), InputError),
    ):
        with pytest.raises(kind):
            asyncio.run(work)


def test_prompts_do_not_wait_for_calls_that_ask_for_tokens() -> None:
    release = threading.Event()
    TOKENS.submit(release.wait)
    try:
        long = "hello world " * 500
        assert asyncio.run(encode_prompts(TOKENIZER, [long], len(long)))
    finally:
        release.set()
    assert asyncio.run(decode(TOKENIZER, [[65] * 5000])) == [TOKENIZER.decode([65] * 5000)]


def test_what_is_left_of_a_cancelled_call_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    slices = []

    def slow(tokenizer: Tokenizer, batch: list[str]) -> list[list[int]]:
        slices.append(len(batch))
        time.sleep(0.02)
        return [[0] for _ in batch]

    monkeypatch.setattr(texts, "_encode", slow)

    async def leave() -> None:
        encoding = asyncio.create_task(encode_texts(TOKENIZER, ["hello world " * 20_000]))
        await asyncio.sleep(0.05)
        encoding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await encoding

    asyncio.run(leave())
    TOKENS.submit(int).result()
    assert 1 <= len(slices) <= 4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    with attacked(tmp_path_factory.mktemp("texts")) as server:
        yield server


@pytest.mark.parametrize("text", ["a" * 4_000_000, "hello world " * 300_000], ids=["stretch", "words"])
@pytest.mark.parametrize("where", ["tokenize", "predict", "infer", "generate", "completions"])
def test_long_texts_of_clients_that_left_hold_nobody(server: Attacked, text: str, where: str) -> None:
    path, body = _asking(where, text)
    used = server.processor()
    with server.watched() as pulse:
        for _ in range(6):
            server.send(path, body).close()
        status, _ = server.post(path, body)
    assert status == 400
    assert server.processor() - used < 2 and pulse.worst < 5


def _asking(where: str, text: str) -> tuple[str, bytes]:

    asked: dict[str, tuple[str, Any]] = {
        "tokenize": ("/tokenize", {"prompt": text}),
        "predict": ("/v1/models/tiny:predict", {"signature_name": "tokenize", "instances": [text]}),
        "infer": (
            "/v2/models/tiny/infer",
            {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": [text]}]},
        ),
        "generate": ("/v2/models/tiny/generate", {"text_input": text}),
        "completions": ("/v1/completions", {"prompt": text}),
    }
    path, body = asked[where]
    return path, json.dumps(body).encode()
