"""The first stage as a whole: what it leaves behind, and when it says that it is done."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from benchmarks.experiments.prepare_throughput import zero_weights
from builder.data import corpus_filtering
from builder.data.token_shards import open_tokens
from builder.data.tokenizer import load_tokenizer, train_tokenizer
from builder.recipe import CorpusRecipe, ModelRecipe, Recipe, TokenizerRecipe, TrainingRecipe
from builder.stages.prepare import prepare
from serving.errors import InputError
from tests.prepare_kills import recipe_of
from tests.tiny_build import contents


def small_recipe(tmp_path: Path, lines: int = 400) -> Recipe:
    text = tmp_path / "book.txt"
    text.write_text("".join(f"Line {number} of the book is about number {number % 7}.\n" for number in range(lines)))
    return Recipe(
        corpus=CorpusRecipe(paths=(str(text),)),
        tokenizer=TokenizerRecipe(vocab_size=300),
        training=TrainingRecipe(sequence_length=32),
    )


def test_prepare_leaves_corpus_tokenizer_tokens_and_a_summary(tmp_path: Path) -> None:
    lines: list[str] = []
    recipe = small_recipe(tmp_path)
    prepare(recipe, tmp_path / "run", lines.append)
    assert [line.partition(":")[0] for line in lines] == ["corpus", "tokenizer", "tokens"]
    summary = json.loads((tmp_path / "run" / "prepare.json").read_text())
    train, validation = (open_tokens(tmp_path / "run" / "tokens" / f"{side}.bin") for side in ("train", "validation"))
    assert summary["tokens"] == {"train": len(train), "validation": len(validation)}
    assert summary["vocab_size"] == 300
    assert summary["split"] == "ends of documents"
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer")
    text = tokenizer.decode(train[:-1].tolist()) + tokenizer.decode(validation[:-1].tolist())
    assert text == (tmp_path / "book.txt").read_text()
    assert str(tmp_path) not in (tmp_path / "run" / "prepare.json").read_text()


def test_a_small_text_reports_its_smaller_vocabulary(tmp_path: Path) -> None:
    lines: list[str] = []
    recipe = dataclasses.replace(small_recipe(tmp_path), tokenizer=TokenizerRecipe(vocab_size=5000))
    prepare(recipe, tmp_path / "run", lines.append)
    assert "of the 5,000 asked for" in lines[1]


def test_a_base_brings_its_tokenizer_and_context_length(tmp_path: Path) -> None:
    base = tmp_path / "base"
    train_tokenizer(["some other text, other text"] * 3, TokenizerRecipe(vocab_size=270), 16, base)
    size = load_tokenizer(base).get_vocab_size()
    sizes = {"vocab_size": size, "n_positions": 1024, "n_embd": 32, "n_layer": 1, "n_head": 2}
    save_file(zero_weights(size, 1024, 32), base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "gpt2"} | sizes))
    recipe = dataclasses.replace(small_recipe(tmp_path), model=ModelRecipe(base=str(base)))
    prepare(recipe, tmp_path / "run", lambda line: None)
    tokenizer_folder = tmp_path / "run" / "tokenizer"
    assert (tokenizer_folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert json.loads((tokenizer_folder / "tokenizer_config.json").read_text())["model_max_length"] == 1024


def test_too_little_text_leaves_no_summary_not_even_an_old_one(tmp_path: Path) -> None:
    prepare(small_recipe(tmp_path), tmp_path / "run", lambda line: None)
    with pytest.raises(InputError, match="too few to hold out"):
        prepare(small_recipe(tmp_path, lines=3), tmp_path / "run", lambda line: None)
    short = dataclasses.replace(small_recipe(tmp_path, lines=12), training=TrainingRecipe(sequence_length=512))
    with pytest.raises(InputError, match="one row needs 513; add text"):
        prepare(short, tmp_path / "run", lambda line: None)
    assert not (tmp_path / "run" / "prepare.json").exists()


def test_a_limit_that_leaves_no_tokens_is_named(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    recipe = dataclasses.replace(recipe, corpus=dataclasses.replace(recipe.corpus, max_tokens=3))
    with pytest.raises(InputError, match=r"every train document is longer than corpus\.max_tokens 3"):
        prepare(recipe, tmp_path / "run", lambda line: None)


def test_the_number_of_workers_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_filtering, "_CHUNK_DOCUMENTS", 20)
    monkeypatch.setattr(corpus_filtering, "_BLOCK_DOCUMENTS", 50)
    recipe = recipe_of(tmp_path / "text", documents=300)
    whole = []
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        prepare(recipe, folder, lambda line: None, workers=workers)
        whole.append(contents(folder))
    report = json.loads(whole[0]["corpus/report.json"])
    assert set(report["dropped"]) == {"duplicate", "near-duplicate"} and report["cleaning"]["boilerplate"]["documents"]
    assert whole[0] == whole[1]


def test_a_kill_at_some_steps_harms_nothing_and_finished_parts_stay(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.prepare_kills", str(tmp_path), "3"],
        cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["wrong"] == []
    assert record["kills"] > 20 and record["taken_over"] > 3
