"""Streamed text: the joined pieces are the full decode, and nothing that was sent is ever taken back."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from serving.errors import BundleError
from serving.sampling.detokenizer import StopMatcher, TextStream, TokenBytes
from tests.closed_form import END, byte_tokenizer


def build() -> Tokenizer:
    # Merged tokens that cut characters in the middle: the euro sign is E2 82 AC, the emoji F0 9F 98 80.
    tokenizer = byte_tokenizer(merges=[("â", "Ĥ"), ("ð", "Ł"), ("h", "e"), ("he", "l"), ("Ġ", "w")], extra=["¬ĺ", "ab"])
    tokenizer.add_tokens([AddedToken("Größe €", special=False), AddedToken("Ġ", special=False), "plain added"])
    tokenizer.add_special_tokens(["<|pad|>"])
    return tokenizer


TOKENIZER = build()
SHARED = TokenBytes(TOKENIZER)
SIZE = TOKENIZER.get_vocab_size(with_added_tokens=True)
TEXTS = ["hello world", "a€b€€c", "😀😀 ok", "x\ufffdy", "ababab", "Größe € plain added", f"a{END}b"]
TOKENS = st.one_of(
    st.lists(st.integers(0, SIZE + 3), max_size=30),
    st.lists(st.sampled_from(TEXTS), max_size=4).map(lambda texts: TOKENIZER.encode("".join(texts)).ids),
)


def id_of(text: str) -> int:
    found = TOKENIZER.token_to_id(text)
    assert found is not None
    return found


STOPS = st.lists(
    st.sampled_from(["a", "ab", "aba", "bab", "€", "€€", "\ufffd", "o w", " ", "😀 ", "lo worl", "hello world!"])
    | st.text("ab€\ufffd ", min_size=1, max_size=4),
    max_size=3,
)


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """`text` before the stop string that is complete first, the longest of those complete at once."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


@given(TOKENS, STOPS)
@settings(derandomize=True, deadline=None, max_examples=600)
@example([SIZE - 1, 0, SIZE + 100], ["a"])
def test_joined_pieces_are_the_full_decode_cut_at_the_stop(tokens: list[int], stops: list[str]) -> None:
    stream = TextStream(SHARED, stops)
    sent = ""
    full, stopped = cut(TOKENIZER.decode(tokens, skip_special_tokens=True), stops)
    for token in tokens:
        piece = stream.push(token)
        assert not (stream.stopped and stream.push(token)), "text after a stop string"
        sent += piece
        assert full.startswith(sent), "sent text that is not final"
        if stream.stopped:
            break
    sent += stream.finish()
    assert sent == full
    assert stream.stopped == stopped


@given(TOKENS)
@settings(derandomize=True, deadline=None)
def test_nothing_final_is_held_back(tokens: list[int]) -> None:
    stream = TextStream(SHARED)
    sent = ""
    for count, token in enumerate(tokens, 1):
        sent += stream.push(token)
        # At most the bytes of one unfinished character, which the full decode shows as one U+FFFD, are missing.
        assert TOKENIZER.decode(tokens[:count], skip_special_tokens=True) in (sent, sent + "\ufffd")


def test_half_characters_and_half_stop_strings_wait() -> None:
    ids = TOKENIZER.encode("€").ids
    stream = TextStream(TOKENIZER)
    assert [stream.push(each) for each in ids] == [""] * (len(ids) - 1) + ["€"]
    stream = TextStream(TOKENIZER, ("stop", "top!"))
    pieces = [stream.push(id_of(each)) for each in "astoast"]
    assert pieces == ["a", "", "", "", "stoa", "", ""]
    assert stream.finish() == "st" and not stream.stopped
    stream = TextStream(TOKENIZER, ("stop", "top!"))
    assert "".join(stream.push(id_of(each)) for each in "a stop!".replace(" ", "Ġ")) == "a "
    assert stream.stopped and stream.push(id_of("a")) == "" == stream.finish()


def test_unfinished_bytes_become_one_replacement() -> None:
    stream = TextStream(SHARED)
    assert [stream.push(each) for each in TOKENIZER.encode("😀").ids[:-1]] == [""] * (
        len(TOKENIZER.encode("😀").ids) - 1
    )
    assert stream.finish() == "\ufffd"


@given(st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4), st.text("abc", max_size=20))
@settings(derandomize=True, deadline=None)
def test_matcher_is_the_brute_force(stops: list[str], text: str) -> None:
    matcher = StopMatcher(stops)
    for end, character in enumerate(text, 1):
        seen = text[:end]
        assert matcher.push(character) == max((len(stop) for stop in stops if seen.endswith(stop)), default=0)
        starts = {stop[:size] for stop in stops for size in range(1, len(stop) + 1)}
        assert matcher.held == max((size for size in range(1, end + 1) if seen[-size:] in starts), default=0)


def test_time_is_linear_even_for_hostile_stop_strings() -> None:
    stream = TextStream(SHARED, ("a" * 50_000 + "b",))
    token = id_of("a")
    began = time.monotonic()
    for _ in range(100_000):
        stream.push(token)
    assert len(stream.finish()) == 50_000
    assert time.monotonic() - began < 5


def test_other_tokenizers_are_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.decoder = decoders.Metaspace()
    with pytest.raises(BundleError, match="ByteLevel"):
        TextStream(tokenizer)


def with_special_tokens() -> Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<user>", special=True), AddedToken("<sep>", special=True)])
    return tokenizer


def test_a_stop_text_that_is_a_special_token_stops_where_it_is() -> None:
    tokenizer = with_special_tokens()
    user, sep = tokenizer.token_to_id("<user>"), tokenizer.token_to_id("<sep>")
    ids = [*tokenizer.encode("Gr\u00fc").ids[:-1], sep, *tokenizer.encode("more").ids, user, 5]
    for stop, text, by in (
        (["<user>"], "Gr\ufffdmore", "<user>"),
        (["<sep>", "<user>"], "Gr\ufffd", "<sep>"),
        (["more", "<user>"], "Gr\ufffd", "more"),
        (["morer", "<user>"], "Gr\ufffdmore", "<user>"),
        (["no"], "Gr\ufffdmore" + tokenizer.decode([5]), None),
    ):
        stream = TextStream(tokenizer, stop)
        assert "".join([*map(stream.push, ids), stream.finish()]) == text
        assert stream.stopped_by == by and stream.stopped == (by is not None)


def test_ordinary_text_that_reads_like_a_special_token_stops_too() -> None:
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, ["<user>"])
    assert "".join(map(stream.push, tokenizer.encode("hi<user>more").ids)) == "hi"


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 14), max_size=20))
def test_word_pieces_joined_are_the_full_decode(tokens: list[int]) -> None:
    words = ["[UNK]", "[SEP]", "the", "##s", "漢", "字", "，", ".", "don", "'", "t", "##n't", "do", "not", "!"]
    tokenizer = Tokenizer(models.WordPiece({word: id for id, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([AddedToken("[SEP]", special=True)])
    stream = TextStream(tokenizer)
    assert "".join([*map(stream.push, tokens), stream.finish()]) == tokenizer.decode(tokens)
