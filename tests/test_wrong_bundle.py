"""Bundles that are not what they were, and folders that never were one: refused in one line by every command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from serving.cli import run
from tests.tiny_build import Fails, TinyBuild, contents

KINDS = (
    "manifest.json", "config.json", "generation_config.json", "README.md", "golden.json", "verification.json",
    "tokenizer.json", "vocab.json", "merges.txt", "model.safetensors", "onnx/model.onnx", "onnx/model.onnx_data",
    "ort/fp32/model.onnx", "ort/fp32/model.onnx_data", "savedmodel/1/saved_model.pb",
    "savedmodel/1/variables/variables.index", "savedmodel/1/variables/variables.data-00000-of-00001",
)  # fmt: skip


@pytest.fixture
def bundle(built: TinyBuild, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built.bundle, tmp_path / "bundle"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    # Nothing has the manifest's own hash, so there it is a byte that the format needs.
    data[0 if path.name == "manifest.json" else len(data) // 2] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_byte(fails: Fails, bundle: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    flip(bundle / name)
    before = contents(bundle)
    where = [] if name == "manifest.json" else [name]
    fails(["inspect", str(bundle)], 1, *where)
    fails(["verify", str(bundle)], 1, *where)
    # `generate` compares sizes only, to answer at once: it runs, or says what it cannot load.
    for runtime in ("onnx", "tensorflow"):
        arguments = ["generate", str(bundle), "Return", "--max-new-tokens", "1", "--runtime", runtime]
        if run(arguments) != 0:
            fails(arguments, 1)
        capfd.readouterr()
    assert contents(bundle) == before


def test_changed_weights_are_neither_measured_nor_judged(fails: Fails, bundle: Path) -> None:
    flip(bundle / "ort/fp32/model.onnx_data")
    fails(["bench", str(bundle), "--target", "ort/fp32"], 1, "ort/fp32/model.onnx_data")
    index = bundle / "savedmodel/1/variables/variables.index"
    index.write_bytes(b"?" * index.stat().st_size)
    fails(["lint", str(bundle)], 1, "savedmodel/1: TensorFlow cannot load it")


@pytest.mark.parametrize("name", KINDS[1:])
def test_a_missing_and_a_cut_file(fails: Fails, bundle: Path, name: str) -> None:
    data = (bundle / name).read_bytes()
    (bundle / name).write_bytes(data[:-1])
    for arguments in (["inspect", str(bundle)], ["generate", str(bundle), "x"], ["verify", str(bundle)]):
        fails(arguments, 1, name, "bytes instead of")
    (bundle / name).unlink()
    for arguments in (["inspect", str(bundle)], ["generate", str(bundle), "x"], ["verify", str(bundle)]):
        fails(arguments, 1, name, "is missing")


def test_manifests(fails: Fails, bundle: Path) -> None:
    good = json.loads((bundle / "manifest.json").read_text())
    cases: list[tuple[Any, str]] = [
        (good | {"schema_verzion": 1}, "schema_verzion"),
        (good | {"schema_version": 99}, "99"),
        ({key: value for key, value in good.items() if key != "graphs"}, "graphs"),
        (good | {"artifacts": [{**good["artifacts"][0], "path": "../up"}]}, "../up"),
        ([], "manifest.json"),
    ]
    for manifest, word in cases:
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        for arguments in (["inspect", str(bundle)], ["generate", str(bundle), "x"], ["verify", str(bundle)]):
            fails(arguments, 1, word)
    (bundle / "manifest.json").unlink()
    for arguments in (["inspect", str(bundle)], ["generate", str(bundle), "x"], ["verify", str(bundle)]):
        fails(arguments, 1, "this is not a bundle")


def test_folders_that_are_no_bundle(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, code, words in (("none", 2, "no such folder"), ("file", 2, "is not a folder"), (".", 1, "not a bundle")):
        for command in (["inspect"], ["verify"], ["generate"]):
            arguments = [*command, str(tmp_path / name), *(["x"] if command == ["generate"] else [])]
            fails(arguments, code, words)


# Every command that opens a bundle, with what it would write.
OPENING = (
    "inspect B", "generate B x", "verify B", "serve B --port 0", "batch B requests.jsonl answers.jsonl",
    "evaluate B --text requests.jsonl", "bench B", "export B --gguf x.gguf",
    *(f"deploy B --output out --target {each}" for each in ("tfserving", "compose", "kubernetes", "kserve", "triton")),
)  # fmt: skip


@pytest.mark.parametrize("command", OPENING)
def test_a_bundle_of_another_schema_is_refused_and_nothing_is_written(
    fails: Fails, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "requests.jsonl").write_text('{"custom_id": "a"}\n')
    manifest = json.loads((bundle / "manifest.json").read_text())
    # What a newer schema may hold is unknown here, so nothing else of it may be complained about.
    newer = {"schema_version": 2, "artifacts": {"folders": [[]]}, "engines": None}
    for table, advice in (
        (newer, "install a newer gpt2-bundle"),
        (manifest | {"schema_version": 0}, "build the bundle again, or install the version that wrote it"),
    ):
        (bundle / "manifest.json").write_text(json.dumps(table))
        before = contents(tmp_path)
        words = [str(bundle) if word == "B" else word for word in command.split()]
        line = fails(words, 1, f"schema_version is {table['schema_version']} but this version of gpt2-bundle reads 1")
        assert advice in line and len(line) < 300 + len(str(bundle))
        assert contents(tmp_path) == before
