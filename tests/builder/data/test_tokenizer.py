"""The byte-level BPE loses nothing, is the same each time, and loads where GPT-2's does."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers

import builder.data.tokenizer
from builder.data.base_tokenizer import read_base_tokenizer, write_base_tokenizer
from builder.data.tokenizer import (
    TOKENIZER_FILES,
    can_cut,
    end_token_id,
    even_sample,
    load_tokenizer,
    pieces,
    train_tokenizer,
    vocabulary_size,
)
from builder.recipe import TokenizerRecipe
from builder.special_tokens import END_TOKEN, GENERATION_CONFIG, TokenIds, read_token_ids
from serving.errors import InputError

TEXTS = [
    f"The {word} reads a file, and doesn't write {word}s #{number}.\n\n    # Indented 漢字\n" * 3
    for number, word in enumerate(["parser", "writer", "stream", "handler", "socket", "naïve reader"])
]
SAMPLES = ["", " ", "The parser's  two\n\n spaces\t", "Grüße 漢字 👋🏽 \x00\x85\u2028", "a" * 500, f"one{END_TOKEN}two"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, TokenizerRecipe(vocab_size=320), 128, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def test_the_vocabulary_is_what_was_asked_for_and_ends_with_the_end_token(folder: Path, tokenizer: Tokenizer) -> None:
    assert vocabulary_size(tokenizer) == 320
    assert end_token_id(tokenizer) == 319
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert list(vocab.values()) == list(range(320))
    assert vocab[END_TOKEN] == 319
    assert len((folder / "merges.txt").read_text(encoding="utf-8").splitlines()) == 1 + 320 - 257
    assert sorted(path.name for path in folder.iterdir()) == sorted((*TOKENIZER_FILES, GENERATION_CONFIG))
    assert read_token_ids(folder) == TokenIds(319, 319)
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 128


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.text(), st.text(alphabet="ab 's\n\t.é漢👋\x00"), st.sampled_from(SAMPLES)))
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= token < 320 for token in ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("ab1.'s \n\t\r\x1c\x85\u3000漢"), max_size=80), size=st.integers(1, 20))
def test_cutting_a_long_text_changes_no_token(tokenizer: Tokenizer, text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builder.data.tokenizer._PIECE_CHARACTERS", size)
        found = list(pieces(text))
    assert "".join(piece for piece, _ in found) == text
    assert [last for _, last in found] == [False] * (len(found) - 1) + [True]
    assert [token for piece, _ in found for token in tokenizer.encode(piece).ids] == tokenizer.encode(text).ids


def test_cutting_is_left_off_where_it_could_change_a_token(tokenizer: Tokenizer) -> None:
    assert can_cut(tokenizer)
    for added in (AddedToken("two words"), AddedToken("greedy", rstrip=True)):
        other = Tokenizer.from_str(tokenizer.to_str())
        other.add_tokens([added])
        assert not can_cut(other)
    other = Tokenizer.from_str(tokenizer.to_str())
    other.normalizer = normalizers.NFC()
    assert not can_cut(other)
    assert not can_cut(Tokenizer(models.BPE()))


def test_the_end_token_is_one_token_in_a_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(f"one{END_TOKEN}two").ids.count(319) == 1
    assert 319 not in tokenizer.encode("one<|endoftex").ids


def test_training_again_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(iter(TEXTS), TokenizerRecipe(vocab_size=320), 128, tmp_path)
    for name in TOKENIZER_FILES:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_a_small_corpus_gives_a_smaller_vocabulary(tmp_path: Path) -> None:
    few = train_tokenizer(["abab abab"], TokenizerRecipe(vocab_size=1000), 16, tmp_path)
    assert 257 < vocabulary_size(few) < 270
    assert end_token_id(few) == vocabulary_size(few) - 1
    bytes_only = train_tokenizer(["abab abab"], TokenizerRecipe(vocab_size=257), 16, tmp_path)
    assert vocabulary_size(bytes_only) == 257
    assert bytes_only.decode(bytes_only.encode("👋").ids) == "👋"


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_vocabulary_and_merges_alone_make_the_same_tokenizer(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, names: tuple[str, str]
) -> None:
    for name, source in zip(names, ("vocab.json", "merges.txt"), strict=True):
        (tmp_path / name).write_bytes((folder / source).read_bytes())
    old = load_tokenizer(tmp_path)
    for text in [*TEXTS, *SAMPLES]:
        assert old.encode(text).ids == tokenizer.encode(text).ids
    copied = tmp_path / "copied"
    write_base_tokenizer(read_base_tokenizer(tmp_path, tmp_path), 128, copied)
    for name in (*TOKENIZER_FILES, GENERATION_CONFIG):
        assert (copied / name).read_bytes() == (folder / name).read_bytes()


def test_a_merge_may_begin_like_a_comment(tmp_path: Path) -> None:
    trained = train_tokenizer(["###### ######"] * 3, TokenizerRecipe(vocab_size=300), 16, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert load_tokenizer(tmp_path).encode("######").ids == trained.encode("######").ids


def test_stored_truncation_and_padding_are_switched_off(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    base = read_base_tokenizer(tmp_path, tmp_path)
    write_base_tokenizer(base, 16, tmp_path / "copied")
    copied = base.tokenizer
    assert copied.decode(copied.encode(TEXTS[0]).ids) == TEXTS[0]
    assert '"truncation": null' in (tmp_path / "copied" / "tokenizer.json").read_text(encoding="utf-8")


def test_folders_without_a_usable_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tokenizer here; run 'gpt2-bundle prepare'"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match=r"no tokenizer here; it needs tokenizer\.json"):
        read_base_tokenizer(tmp_path, tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(InputError, match=r"vocab\.json and merges\.txt are not a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(InputError, match="nothing says which token ends a text"):
        read_base_tokenizer(tmp_path, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(tmp_path)
    Tokenizer(models.WordLevel({END_TOKEN: 0}, unk_token=END_TOKEN)).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="neither a byte-level BPE nor a WordPiece"):
        read_base_tokenizer(tmp_path, tmp_path)


@pytest.mark.parametrize("missing", [(), ("tokenizer.json",)])
def test_transformers_reads_it_as_gpt2(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, missing: tuple[str, ...]
) -> None:
    transformers = pytest.importorskip("transformers")
    for name in TOKENIZER_FILES:
        if name not in missing:
            (tmp_path / name).write_bytes((folder / name).read_bytes())
    for load in (transformers.AutoTokenizer, transformers.GPT2TokenizerFast):
        theirs = load.from_pretrained(str(tmp_path))
        assert (theirs.eos_token_id, theirs.bos_token_id, theirs.vocab_size) == (319, 319, 320)
        assert theirs.model_max_length == 128
        for text in [*TEXTS, *SAMPLES]:
            ids = tokenizer.encode(text).ids
            assert theirs(text)["input_ids"] == ids
            assert theirs.decode(ids) == text


CHINESE = (
    "\u3000\u3000话说天下大势，分久必合，合久必分。周末七国分争，并入于秦！及秦灭之后，楚、汉分争，又并入于汉…\n\u3000\u3000“真的吗？”他问—",
    "これはペンです。「そうですか」、はい！\n\n　　次の行\t《本》（一）ABC，don't。 I'm，it's… 3，4。５，six",
)


@pytest.mark.parametrize("text", CHINESE)
def test_pieces_of_chinese_and_japanese_have_the_tokens_of_the_whole(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = train_tokenizer(["".join(CHINESE) * 3], TokenizerRecipe(vocab_size=400), 16, tmp_path)
    draw = random.Random(3)
    mixed = "".join(draw.choices(text + "。，  \n\u3000x'1é\u0301", k=3000))
    for whole in (text, text * 50, mixed):
        for size in (1, 5, 40):
            monkeypatch.setattr(builder.data.tokenizer, "_PIECE_CHARACTERS", size)
            parts = [piece for piece, _ in pieces(whole)]
            assert "".join(parts) == whole
            assert len(parts) > 1 and (whole is mixed or max(map(len, parts)) < size + 40)
            assert [id for part in parts for id in tokenizer.encode(part).ids] == tokenizer.encode(whole).ids
    monkeypatch.undo()
    longest = max(map(len, (piece for piece, _ in pieces(CHINESE[0] * 500))))
    assert longest < 2100, "a novel without a blank is never one piece"


def test_an_added_token_that_a_cut_could_split_forbids_cuts(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens([END_TOKEN, "[PAD]", "<|im_start|>"])
    assert can_cut(tokenizer)
    tokenizer.add_special_tokens(["完。结"])
    assert not can_cut(tokenizer)


def test_a_vocabulary_is_learnt_from_an_even_part_of_a_long_text_without_spaces() -> None:
    english = ["some words of a text " * 500]
    clause = "".join(chr(0x4E00 + place) for place in range(9))
    chinese = [clause + "，" for _ in range(100)]
    assert list(even_sample(lambda: english + chinese, 900)) == english + chinese
    sample = "".join(even_sample(lambda: english + chinese, 450))
    assert sample.count(english[0]) == 1 and 48 <= sample.count(clause) <= 50
    novel = "".join(chinese) * 100
    part = list(even_sample(lambda: [novel], 9000))
    assert 7000 < sum(map(len, part)) < 12_000
    assert all(piece in novel for piece in part)
