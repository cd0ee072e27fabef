"""The tokenizer in the graph gives what the `tokenizers` library gives, for every string of bytes."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from builder.data.docstrings import read_docstrings
from builder.data.tokenizer import END_TOKEN, train_tokenizer
from builder.keras_backend import tf
from builder.recipe import TokenizerRecipe
from builder.tf_export.byte_pair_tables import byte_pair_tables, character_classes, problem
from builder.tf_export.graph_tokenizer import GraphTokenizer
from tests.closed_form import byte_tokenizer

Encode = Callable[[Sequence[bytes]], list[list[int]]]

EDGES = [
    "", " ", "  ", "\n", " \n", "\n ", " x", "  x", "x ", "x  ", "x \n\ty", "\r\n\r\n  x\r\n", "\t\tx\t y", "a\u00a0b",
    "a \u00a0 b", "\u3000\u3000x", "x\u3000", "a\u2003\u2003 b", "a\x85b", "a\u2028 b\u2029", "a\x1c b",
    "\u200b x\u200b", "\ufeffx", "\x00 \x00\x00",
    "it's", "it'S", "IT'S", "we've we'll I'd I'm you're don't", "'s", "''s", "'s's", "!'s", " 's", "  's", "\t's",
    "'salt",
    "'relly", "'r", "'l", "'ll'", "x'", "'\u00e9", "1's", "'ve been", "\u2019s", "'s\n", "'t 't", "a'b'c'd'e", "'re're",
    "'d.", "'m1", "123 456", "١٢٣ ٤٥", "४५६ ६", "Ⅷ ½ ² ①", "一二三", "1a2b", "3.14e-10", "x² + y³",
    "Grüße, naïve café", "cafe\u0301 nai\u0308ve", "Ελληνικά και кириллица", "עברית וערבית العربية", "हिन्दी में लिखा",
    "ภาษาไทย ไม่มีวรรค", "日本語のテキスト。漢字とかな", "한국어 문장", "Tiếng Việt", "ʻokina ǅ ǆ ª º", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛 𐐀𐐨",
    "Ĵ Ġ Ċ ĉ \u0120the", "👋🏽 👩\u200d👩\u200d👧\u200d👦 🇩🇪 ☺\ufe0f ❤\ufe0f\u200d🔥", "🙂🙂🙂", "a👋b",
    "\U000e0061 \U0010ffff \ue000 \ufdd0 \uffff", "a" * 300, "ab" * 200, "!" * 100, " " * 100, "\n" * 50 + "x",
    "漢" * 120,
    END_TOKEN, f"{END_TOKEN}{END_TOKEN}", f"a {END_TOKEN} b", f"a  {END_TOKEN}  b", f"'{END_TOKEN}s", f"{END_TOKEN}'s",
    f"x\n{END_TOKEN}\n", f"<{END_TOKEN}>", "<|endoftext|", "|endoftext|>", "<|endoftext |>", "<|ENDOFTEXT|>",
    f"<|endof{END_TOKEN}text|>",
]  # fmt: skip
ILL_FORMED = [
    b"\x80", b"\xff\xfe", b"a\xc3", b"\xc3(", b"\xe2\x82", b"\xe2\x82x", b"\xe2(\xa1", b"\xf0\x9f\x91",
    b"\xf0\x9f\x91 x",
    b"\xf0(\x8c\xbc", b"\xc0\xaf", b"\xe0\x80\xaf", b"\xe0\x9f\xbf", b"\xf0\x8f\xbf\xbf", b"\xed\xa0\x80",
    b"\xed\xb0\x80x",
    b"\xed\xa0\x81\xed\xb0\x80", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xf8\x88\x80\x80\x80",
    b"\xfc\x84\x80\x80\x80\x80", b"\xef\xbb\xbfx", b"\xef\xbf\xbe", b"it\xff's", b" \xff", b"  \xff x",
    b"<|endof\xfftext|>", b"\xff<|endoftext|>\xff", b"\xe2\x80\xa8\xe2\x80",
]  # fmt: skip


def expected(tokenizer: Tokenizer, texts: Sequence[bytes]) -> list[list[int]]:
    readable = [text.decode("utf-8", "replace") for text in texts]
    return [encoding.ids for encoding in tokenizer.encode_batch(readable, add_special_tokens=False)]


def encoder(tokenizer: Tokenizer) -> Encode:
    graph = GraphTokenizer(tokenizer, tokenizer.get_vocab_size())
    encode = tf.function(
        lambda texts: graph.encode(texts), input_signature=[tf.TensorSpec([None], tf.string)], autograph=False
    )

    def run(texts: Sequence[bytes]) -> list[list[int]]:
        result: list[list[int]] = encode(tf.constant(texts, tf.string)).to_list()
        return result

    return run


def assert_equal(encode: Encode, tokenizer: Tokenizer, texts: Sequence[bytes]) -> None:
    for text, mine, theirs in zip(texts, encode(texts), expected(tokenizer, texts), strict=True):
        assert mine == theirs, text


def with_added_tokens() -> Tokenizer:
    """Ids in an order of their own, and added tokens: special, not special, and one that the vocabulary has."""
    tokenizer = byte_tokenizer([("a", "b"), ("Ġ", "ab"), ("ab", "ab"), ("a", "ab"), ("a", "a"), ("Ċ", "Ċ"), ("'", "s")])
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.add_tokens([AddedToken("naïve", normalized=False), AddedToken("aab", normalized=False)])
    return tokenizer


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return [document.text for document in read_docstrings()]


@pytest.fixture(scope="module")
def trained(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Encode]:
    tokenizer = train_tokenizer(corpus[::20], TokenizerRecipe(vocab_size=1500), 64, tmp_path_factory.mktemp("trained"))
    return tokenizer, encoder(tokenizer)


@pytest.fixture(scope="module", params=["trained", "added tokens", "bytes alone"])
def pair(request: pytest.FixtureRequest, trained: tuple[Tokenizer, Encode]) -> tuple[Tokenizer, Encode]:
    if request.param == "trained":
        return trained
    tokenizer = with_added_tokens() if request.param == "added tokens" else byte_tokenizer()
    return tokenizer, encoder(tokenizer)


# Encoding.


def test_the_edges_of_the_pattern(pair: tuple[Tokenizer, Encode]) -> None:
    tokenizer, encode = pair
    texts = [text.encode() for text in EDGES]
    assert_equal(encode, tokenizer, texts)
    for text in texts:
        assert_equal(encode, tokenizer, [text])


def test_bytes_that_are_not_utf8_are_read_as_python_reads_them(pair: tuple[Tokenizer, Encode]) -> None:
    tokenizer, encode = pair
    assert_equal(encode, tokenizer, ILL_FORMED)
    assert encode([b"\xe2\x82"]) == [tokenizer.encode("\ufffd").ids] != encode([b"\xe2\x28"])


def test_rows_of_nothing_and_no_rows(pair: tuple[Tokenizer, Encode]) -> None:
    _, encode = pair
    assert encode([]) == [] and encode([b""]) == [[]] and encode([b"", b"", b""]) == [[], [], []]


@pytest.mark.slow
def test_the_whole_default_corpus(corpus: list[str], trained: tuple[Tokenizer, Encode]) -> None:
    tokenizer, encode = trained
    texts = [text.encode() for text in corpus]
    assert sum(map(len, texts)) > 1_000_000
    for start in range(0, len(texts), 1000):
        assert_equal(encode, tokenizer, texts[start : start + 1000])


@pytest.mark.parametrize("seed", range(5))
def test_random_bytes(trained: tuple[Tokenizer, Encode], seed: int) -> None:
    choose = random.Random(seed)
    assert_equal(trained[1], trained[0], [choose.randbytes(choose.randint(0, 40)) for _ in range(20_000)])


def test_random_mixtures(pair: tuple[Tokenizer, Encode]) -> None:
    choose = random.Random(5)
    parts = [text.encode() for text in EDGES if len(text) < 16] + ILL_FORMED
    parts += [b"a", b"ab", "naïve".encode(), b"[PAD]", b"[PAD", b"'s", b" ", b"\n"]
    assert_equal(pair[1], pair[0], [b"".join(choose.choices(parts, k=choose.randint(2, 8))) for _ in range(3000)])


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.one_of(st.text().map(str.encode), st.binary()), min_size=1, max_size=4))
@example(texts=[b"", b"x", b""])
def test_any_batch(trained: tuple[Tokenizer, Encode], texts: list[bytes]) -> None:
    assert_equal(trained[1], trained[0], texts)


@pytest.mark.parametrize("seed", range(12))
def test_merges_of_any_order(seed: int) -> None:
    """Merges that no training would give: results that are parts of earlier merges, and reached in several ways."""
    choose = random.Random(seed)
    entries = ["a", "b", "c"]
    merges: list[tuple[str, str]] = []
    while len(merges) < 30:
        left, right = choose.choice(entries), choose.choice(entries)
        if len(left + right) <= 7 and (left, right) not in merges:
            merges.append((left, right))
            entries.append(left + right)
    merges = merges[:5] + choose.sample(merges[5:], len(merges) - 5)
    tokenizer = byte_tokenizer(merges)
    graph = GraphTokenizer(tokenizer, tokenizer.get_vocab_size())
    texts = ["".join(choose.choices("abc", [5, 3, 1], k=choose.randint(1, 24))).encode() for _ in range(1500)]
    assert graph.encode(tf.constant(texts)).to_list() == expected(tokenizer, texts)


def test_some_of_those_merges_must_be_done_one_at_a_time() -> None:
    # Merging both (a, bc) at once would leave no "abca": its merge comes first as soon as the first "abc" is there.
    merges = [("b", "c"), ("abc", "a"), ("a", "bc")]
    tokenizer = byte_tokenizer(merges)
    tables = byte_pair_tables(tokenizer, tokenizer.get_vocab_size())
    assert tables.pair_together.tolist().count(False) == 1
    assert_equal(encoder(tokenizer), tokenizer, [b"abcabc", b"abcabcabc", b"aabcabca"])
    assert [tokenizer.id_to_token(token) for token in tokenizer.encode("abcabc").ids] == ["abca", "bc"]


@pytest.mark.slow
def test_every_code_point(pair: tuple[Tokenizer, Encode]) -> None:
    """Its class is the library's, beside a letter, a digit, a sign, a blank and a contraction."""
    tokenizer, encode = pair
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    rows = [
        "".join(f"x{c}x1{c}1!{c}! {c}\n {c}'s{c}" for c in map(chr, points[start : start + 128]))
        for start in range(0, len(points), 128)
    ]
    for start in range(0, len(rows), 200):
        assert_equal(encode, tokenizer, [row.encode() for row in rows[start : start + 200]])


def test_the_classes_are_few_runs_that_cover_every_code_point() -> None:
    starts, classes = character_classes()
    assert starts[0] == 0 and (starts[1:] > starts[:-1]).all() and starts[-1] < 0x110000
    assert (classes[1:] != classes[:-1]).all() and 1000 < len(starts) < 4000


# Decoding.


@pytest.mark.parametrize("kind", ["trained", "added tokens"])
def test_decoding_is_the_librarys(trained: tuple[Tokenizer, Encode], kind: str) -> None:
    tokenizer = trained[0] if kind == "trained" else with_added_tokens()
    size = tokenizer.get_vocab_size() + 10  # A model may have more rows than the tokenizer has entries.
    graph = GraphTokenizer(tokenizer, size)
    choose = random.Random(3)
    bytes_ = [tokenizer.token_to_id(letter) for letter in pre_tokenizers.ByteLevel.alphabet()]
    rows = [choose.choices(choose.choice([range(size), bytes_]), k=20) for _ in range(3000)]
    lengths = [choose.randint(0, 20) for _ in rows]
    texts = graph.decode(tf.constant(rows, tf.int32), tf.constant(lengths, tf.int32)).numpy()
    wanted = [tokenizer.decode(row[:length]) for row, length in zip(rows, lengths, strict=True)]
    assert [text.decode("utf-8") for text in texts] == wanted
    assert sum("\ufffd" in text for text in wanted) > 500


def test_valid_text_comes_back(trained: tuple[Tokenizer, Encode]) -> None:
    graph = GraphTokenizer(trained[0], trained[0].get_vocab_size())
    texts = [text for text in EDGES if END_TOKEN not in text]
    rows = graph.encode(tf.constant(texts))
    back = graph.decode(rows.to_tensor(), tf.cast(rows.row_lengths(), tf.int32)).numpy()
    assert [text.decode("utf-8") for text in back] == texts


# Which tokenizers it is for.


def changed(change: Callable[[Any], None], **model: Any) -> Tokenizer:
    tokenizer = byte_tokenizer([("a", "b")])
    if model:
        vocab = tokenizer.get_vocab(with_added_tokens=False)
        fresh = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")], **model))
        fresh.pre_tokenizer, fresh.decoder = tokenizer.pre_tokenizer, tokenizer.decoder
        tokenizer = fresh
    change(tokenizer)
    return tokenizer


REFUSED: dict[str, tuple[Tokenizer, str]] = {
    "a normalizer": (changed(lambda it: setattr(it, "normalizer", normalizers.NFC())), "normalizer"),
    "a blank in front": (
        changed(lambda it: setattr(it, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True))),
        "pre-tokenizer",
    ),
    "another decoder": (changed(lambda it: setattr(it, "decoder", decoders.Fuse())), "decoder"),
    "dropout": (changed(lambda it: None, dropout=0.1), "dropout"),
    "ignored merges": (changed(lambda it: None, ignore_merges=True), "ignore_merges"),
    "whole words": (changed(lambda it: it.add_tokens([AddedToken("xy", single_word=True)])), "whole words"),
    "a token that takes blanks": (changed(lambda it: it.add_tokens([AddedToken("xy", lstrip=True)])), "white space"),
    "overlap": (changed(lambda it: it.add_tokens(["xyz", "zyx"])), "overlap"),
    "overlap with itself": (changed(lambda it: it.add_tokens(["xyx"])), "overlap"),
    "one in the other": (changed(lambda it: it.add_tokens(["wxyz", "xy"])), "overlap"),
    "too few bytes": (Tokenizer(models.BPE(vocab={"a": 0}, merges=[])), "pre-tokenizer"),
    "no BPE": (Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "not a BPE"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_tokenizer_that_the_graph_cannot_reproduce_is_named(case: str) -> None:
    tokenizer, words = REFUSED[case]
    assert words in (problem(tokenizer) or "")


def test_those_of_the_tests_are_none_of_them(trained: tuple[Tokenizer, Encode]) -> None:
    assert [problem(tokenizer) for tokenizer in (trained[0], with_added_tokens(), byte_tokenizer())] == [None] * 3


def test_the_graph_is_of_core_ops_only(trained: tuple[Tokenizer, Encode]) -> None:
    graph = GraphTokenizer(trained[0], trained[0].get_vocab_size())
    specs = tf.TensorSpec([None], tf.string), tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None], tf.int32)
    both = tf.function(lambda text, ids, lengths: (graph.encode(text), graph.decode(ids, lengths)), autograph=False)
    proto = both.get_concrete_function(*specs).graph.as_graph_def()
    nodes = [*proto.node, *(node for function in proto.library.function for node in function.node_def)]
    operations = {node.op for node in nodes}
    assert {"UnicodeDecode", "UnicodeEncode", "LowerBound", "While", "UnicodeTranscode"} <= operations
    # Ops of TensorFlow Text, or of any library but TensorFlow's own, have no entry here.
    assert "tensorflow_text" not in sys.modules
    assert [name for name in operations if not hasattr(tf.raw_ops, name)] == []
    assert not [name for name in operations if "PyFunc" in name or "Xla" in name or "Table" in name]
