"""What decides each stage, and so makes it run again when it changes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import huggingface_hub
import pytest

from builder.data.content_hashes import ContentHashes
from builder.model.hub import download
from builder.model.pretrained import Base
from builder.recipe_reader import read_recipe
from builder.stages.pipeline import _unchanged
from builder.stages.run_keys import Run
from serving.errors import InputError


def test_the_keys_follow_what_decides_each_stage(tmp_path: Path) -> None:
    def keys(*overrides: str) -> tuple[str, str, str]:
        ours = Run(read_recipe(None, overrides), tmp_path)
        return ours.prepare_key(), ours.train_key(), ours.export_key()

    def changed(*overrides: str) -> list[bool]:
        return [ours != theirs for ours, theirs in zip(keys(*overrides), keys(), strict=True)]

    assert changed() == [False, False, False]
    assert changed("name=other") == [False, False, True]
    assert changed("verify.prompts=3") == changed('export.variants=["int8"]') == [False, False, True]
    assert changed("training.learning_rate=0.5") == changed("training.jit_compile=false") == [False, True, True]
    for setting in ("loop=custom", "log_every=3", "tensorboard=true", "sample_tokens=0", "checkpoints_kept=2"):
        assert changed(f"training.{setting}") == [False] * 3, setting
    assert changed("model.n_layer=3") == [False, True, True]
    assert changed("cleaning.html=true") == changed("corpus.near_duplicates=true") == [True] * 3
    assert changed("training.packing=rows") == changed("instruction.template=chat") == [True] * 3
    assert changed("seed=3") == changed("tokenizer.vocab_size=300") == changed("corpus.min_characters=3") == [True] * 3


def test_a_base_checkpoint_that_changed_is_read_anew(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()

    def keys(name: str | Path = base) -> tuple[str, str]:
        ours = Run(read_recipe(None, [f"model.base={name}"]), tmp_path)
        return ours.prepare_key(), ours.train_key()

    (base / "model.safetensors").write_bytes(b"1")
    before = keys()
    os.utime(base / "model.safetensors", (1, 1))
    assert keys() == before == keys(f"{base}/../base")
    (base / "model.safetensors").write_bytes(b"2")
    now = keys()
    assert now[0] != before[0] and now[1] != before[1]
    (base / "tokenizer.json").write_text("{}")
    assert keys()[0] != now[0]


def test_a_base_of_the_hub_is_known_by_what_its_files_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    commits = [tmp_path / "snapshots" / commit for commit in ("aaaa", "bbbb", "cccc")]
    for commit, weights in zip(commits, (b"1", b"2", b"1"), strict=True):
        commit.mkdir(parents=True)
        (commit / "config.json").write_text("{}")
        (commit / "model.safetensors").write_bytes(weights)
    (commits[2] / "README.md").write_text("another commit, the same weights")

    def snapshot_download(name: str, **_: object) -> str:
        asked.append(name)
        return str(commits[min(len(asked), 3) - 1])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    def run() -> Run:
        return Run(read_recipe(None, ["model.base=nobody/gpt2"]), tmp_path / "run")

    first = run()
    before = first.prepare_key(), first.train_key()
    assert (first.prepare_key(), first.train_key()) == before and asked == ["nobody/gpt2"]
    assert first.base_parts == Base(commits[0], commits[0])
    download.cache_clear()  # The next command.
    second = run()
    assert second.prepare_key() != before[0] and second.train_key() != before[1]
    download.cache_clear()
    assert (run().prepare_key(), first.train_key()) == before
    assert Run(read_recipe(None, [f"model.base={commits[0]}"]), tmp_path / "run").prepare_key() == before[0]


def test_the_key_is_of_what_the_files_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    texts = Path("texts")
    texts.mkdir()
    (texts / "c.txt").write_text("some text")

    def key(*paths: str) -> str:
        return Run(read_recipe(None, [f"corpus.paths={json.dumps(paths)}"]), tmp_path / "run").prepare_key()

    before = key("texts/c.txt")
    for spelling in ("./texts/c.txt", str(tmp_path / "texts" / "c.txt"), "texts/../texts/c.txt"):
        assert key(spelling) == before, spelling
    folder = key("texts")
    assert folder == key("./texts/") == key(str(tmp_path / "texts"))
    monkeypatch.chdir(texts)
    assert folder == key(".") == key("../texts")
    assert key("*.txt") == key("./*.txt") == key(str(tmp_path / "texts" / "*.txt"))
    os.utime("c.txt", (1, 1))
    assert key("c.txt") == before
    Path("c.txt").write_text("other text")
    assert key("c.txt") != before


def test_a_large_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.txt"
    path.write_bytes(b"x" * (2 << 20))
    os.utime(path, (1e9, 1e9))
    first = ContentHashes(tmp_path / "hashes.json").of(path)
    assert first == hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert ContentHashes(tmp_path / "hashes.json").of(path) == first
    monkeypatch.undo()
    with path.open("ab") as file:
        file.write(b"y")
    assert ContentHashes(tmp_path / "hashes.json").of(path) != first
    (tmp_path / "hashes.json").write_text("[broken")
    assert ContentHashes(tmp_path / "hashes.json").of(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_build_goes_on_with_the_texts_that_it_began_with(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_text("some text")
    run = Run(read_recipe(None, [f"corpus.paths={path}"]), tmp_path / "run")
    key = run.train_key()
    path.write_text("other text")
    assert run.train_key() == key
    with pytest.raises(InputError, match=r"corpus: c\.txt changed while it was read; run the same command again"):
        _unchanged(run)
