"""Shards hold exactly the tokens of the text, and rows are a pure function of seed and step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers

from builder.data import token_shards
from builder.data.packed_batches import RowSampler, training_dataset, validation_dataset
from builder.data.token_shards import open_tokens, write_tokens
from builder.data.tokenizer import end_token_id, train_tokenizer
from builder.recipe import TokenizerRecipe
from serving.errors import InputError

TEXTS = ["The reader reads a line.\nIt doesn't stop.\n\n  Then:  more", "", "Second document 漢字 \t\n x" * 40]
VOCAB_SIZE = 270


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(TEXTS, TokenizerRecipe(vocab_size=VOCAB_SIZE), 64, tmp_path_factory.mktemp("tokenizer"))


def stream(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    return [token for text in texts for token in [*tokenizer.encode(text).ids, end_token_id(tokenizer)]]


def test_a_shard_is_the_documents_each_with_the_end_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "train.bin"
    expected = stream(tokenizer, TEXTS)
    assert write_tokens(iter(TEXTS), tokenizer, path) == len(expected)
    found = open_tokens(path)
    assert isinstance(found, np.memmap)
    assert found.dtype == np.dtype("<u2")
    assert found.tolist() == expected
    assert json.loads((tmp_path / "deep" / "train.json").read_text()) == {
        "dtype": "uint16",
        "byte_order": "little",
        "count": len(expected),
        "documents": 3,
        "vocab_size": VOCAB_SIZE,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


@pytest.mark.parametrize("trim", [False, True])
def test_documents_of_too_many_tokens_are_left_out_or_cut(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trim: bool
) -> None:
    monkeypatch.setattr("builder.data.tokenizer._PIECE_CHARACTERS", 50)
    path, end = tmp_path / "train.bin", end_token_id(tokenizer)
    limit = len(tokenizer.encode(TEXTS[0]).ids)
    long = tokenizer.encode(TEXTS[2]).ids
    expected = [*tokenizer.encode(TEXTS[0]).ids, end, end, *([*long[:limit], end] if trim else [])]
    assert write_tokens(TEXTS, tokenizer, path, max_tokens=limit, trim=trim) == len(expected)
    assert open_tokens(path).tolist() == expected
    index = json.loads((tmp_path / "train.json").read_text())
    assert (index["too_long"], index["documents"]) == (1, 2 + trim)
    write_tokens(TEXTS, tokenizer, path, max_tokens=len(long), trim=trim)
    assert json.loads((tmp_path / "train.json").read_text())["too_long"] == 0


def test_batches_and_pieces_make_the_same_stream(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = TEXTS * 20
    monkeypatch.setattr("builder.data.tokenizer._PIECE_CHARACTERS", 50)
    monkeypatch.setattr("builder.data.token_shards._BATCH_CHARACTERS", 200)
    write_tokens(texts, tokenizer, tmp_path / "a.bin")
    assert open_tokens(tmp_path / "a.bin").tolist() == stream(tokenizer, texts)
    prefixed = Tokenizer.from_str(tokenizer.to_str())
    prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    write_tokens(texts, prefixed, tmp_path / "b.bin")
    assert open_tokens(tmp_path / "b.bin").tolist() == stream(prefixed, texts)


def test_a_large_vocabulary_takes_four_bytes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    large = Tokenizer.from_str(tokenizer.to_str())
    large.add_tokens([f"<{number}>" for number in range(65_536)])
    write_tokens(["a<65535>b"], large, tmp_path / "a.bin")
    found = open_tokens(tmp_path / "a.bin")
    assert found.dtype == np.dtype("<u4")
    assert int(found.max()) == VOCAB_SIZE + 65_535


def test_shards_that_are_missing_or_cut(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with pytest.raises(InputError, match=r"a\.json: no such file.*run 'gpt2-bundle prepare' again"):
        open_tokens(path)
    write_tokens(TEXTS, tokenizer, path)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(InputError, match=r"a\.bin: \d+ bytes where its index says \d+ tokens of 2"):
        open_tokens(path)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(InputError, match="not the index of a token shard"):
        open_tokens(path)
    assert write_tokens([], tokenizer, path) == 0
    assert len(open_tokens(path)) == 0


@pytest.mark.parametrize("count", [9, 16, 17, 100, 103])
def test_an_epoch_is_rows_of_the_ring_without_overlap(count: int) -> None:
    sampler = RowSampler(np.arange(count, dtype=np.uint16), 8, 1, seed=5)
    orders = set()
    for epoch in range(4):
        rows = np.concatenate([sampler.batch(epoch * sampler.rows + row) for row in range(sampler.rows)])
        assert (np.diff(rows, axis=1) % count == 1).all()
        assert len(np.unique(rows[:, :-1])) == sampler.rows * 8
        assert count - sampler.rows * 8 < 8
        orders.add(rows.tobytes())
    assert len(orders) > 1


def test_a_step_depends_on_seed_and_number_only() -> None:
    tokens = np.random.default_rng(0).integers(0, 500, 1000).astype(np.uint16)
    forward = RowSampler(tokens, 16, 7, seed=1)
    batches = [forward.batch(step) for step in range(40)]
    for step in reversed(range(40)):
        np.testing.assert_array_equal(RowSampler(tokens, 16, 7, seed=1).batch(step), batches[step])
    assert not np.array_equal(RowSampler(tokens, 16, 7, seed=2).batch(0), batches[0])


def test_training_resumes_at_any_step() -> None:
    pytest.importorskip("tensorflow")
    tokens = np.random.default_rng(0).integers(0, 500, 1000).astype(np.uint16)
    sizes = {"sequence_length": 16, "batch_size": 4, "seed": 3}
    whole = list(training_dataset(tokens, steps=40, **sizes).as_numpy_iterator())
    resumed = training_dataset(tokens, steps=40, start_step=23, **sizes)
    assert int(resumed.cardinality()) == 17
    for (inputs, targets), again in zip(whole[23:], resumed.as_numpy_iterator(), strict=True):
        assert inputs.shape == targets.shape == (4, 16)
        assert inputs.dtype == targets.dtype == np.int32
        np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
        np.testing.assert_array_equal(inputs, again[0])
        np.testing.assert_array_equal(targets, again[1])
    assert list(training_dataset(tokens, steps=40, start_step=40, **sizes)) == []


@pytest.mark.parametrize("count", [2, 8, 9, 32, 33, 34, 100])
def test_validation_scores_every_token_but_the_first_once(count: int) -> None:
    pytest.importorskip("tensorflow")
    tokens = np.arange(1, count + 1, dtype=np.uint16)
    dataset = validation_dataset(tokens, sequence_length=8, batch_size=4)
    batches = list(dataset.as_numpy_iterator())
    assert len(batches) == int(dataset.cardinality()) == -(-(count - 1) // 32)
    inputs, targets, weights = (np.stack(parts) for parts in zip(*batches, strict=True))
    assert inputs.shape[1:] == (4, 8)
    scored = weights > 0
    assert weights.sum() == count - 1
    assert targets[scored].tolist() == tokens[1:].tolist()
    assert inputs[scored].tolist() == tokens[:-1].tolist()
    assert not targets[~scored].any()


def test_too_few_tokens() -> None:
    sizes = {"sequence_length": 8, "batch_size": 4}
    with pytest.raises(InputError, match="has 8 tokens and one row needs 9"):
        training_dataset(np.arange(8), seed=0, steps=1, **sizes)
    with pytest.raises(InputError, match="has 1 tokens and needs at least 2"):
        validation_dataset(np.arange(1), **sizes)


def test_a_shard_that_was_broken_off_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_tokenizer(["some words and more words"], TokenizerRecipe(vocab_size=270), 16, tmp_path / "tok")
    monkeypatch.setattr(token_shards, "_BATCH_CHARACTERS", 100)
    monkeypatch.setattr(token_shards, "_BATCHES_A_NOTE", 1)
    texts = [f"words and {number} more " * (1 + number % 4) for number in range(60)]
    whole, broken = tmp_path / "whole.bin", tmp_path / "broken.bin"
    encoded: list[int] = []
    ahead = token_shards._encode_ahead

    def breaking() -> Iterator[str]:
        yield from texts[:45]
        raise RuntimeError("killed")

    def counting(*arguments: Any) -> Iterator[Any]:
        for batch, encodings in ahead(*arguments):
            encoded.append(len(batch))
            yield batch, encodings

    monkeypatch.setattr(token_shards, "_encode_ahead", counting)
    for trim in (True, False):
        options: dict[str, Any] = {"max_tokens": 30, "trim": trim}
        write_tokens(texts, tokenizer, whole, **options)
        for key, least in (("one key", 30), ("another key", 0)):
            with pytest.raises(RuntimeError):
                write_tokens(breaking(), tokenizer, broken, resume_key="one key", **options)
            with broken.open("ab") as file:
                file.write(b"half of a batch that was not noted")
            encoded.clear()
            write_tokens(texts, tokenizer, broken, resume_key=key, **options)
            assert 60 - sum(encoded) >= least and (least or sum(encoded) == 60)
            assert broken.read_bytes() == whole.read_bytes()
            assert broken.with_suffix(".json").read_bytes() == whole.with_suffix(".json").read_bytes()
            broken.with_suffix(".progress").unlink()
