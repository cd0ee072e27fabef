"""`gpt2-bundle inspect`: says what is there, refuses what is damaged, loads nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from serving.bundle import open_bundle
from serving.cli import run
from serving.commands.inspect import byte_text, printable


def test_tables_name_everything(bundle_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(bundle_folder)]) == 0
    text = capsys.readouterr().out
    parameters = open_bundle(bundle_folder).manifest.model.parameters
    for wanted in (
        "tiny",
        f"{parameters:,} parameters: 2 layers of 8, 2 heads of 4, MLP 32",
        "64 tokens of a vocabulary of 257",
        "every SHA-256 matches",
        "ort/fp32",
        "shared-buffer",
        "268 B",
        "validation_perplexity  12.5",
        "greedy.equal",
        "training.epochs",
        "tensorflow  2.21.0",
        "abababab",
    ):
        assert wanted in text, wanted
    assert run(["inspect", "--no-hashes", str(bundle_folder)]) == 0
    assert "contents not read" in capsys.readouterr().out


def test_json_is_one_line(bundle_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(bundle_folder), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    table = json.loads(line)
    assert table["manifest"]["name"] == "tiny" and table["checked"] == "hashes"
    assert table["total_size"] == sum(item["size"] for item in table["manifest"]["artifacts"])
    assert table["graph_sizes"]["ort/fp32"] == 268


def test_damage_is_one_line_and_exit_1(bundle_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle_folder / "README.md").write_bytes(b"# tinY\n")
    assert run(["inspect", str(bundle_folder)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "'README.md' has changed" in captured.err
    assert run(["inspect", str(bundle_folder), "--no-hashes"]) == 0
    assert run(["inspect", str(bundle_folder / "nowhere")]) == 2


def test_loads_no_runtime(bundle_folder: Path) -> None:
    code = (
        "import sys; from serving.cli import run; assert run(['inspect', sys.argv[1]]) == 0; "
        "print({'tensorflow', 'onnxruntime', 'onnx', 'numpy', 'tokenizers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle_folder)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_text_that_could_drive_a_terminal_is_escaped() -> None:
    assert printable("a\x1b[31m\n\u202e[red]é") == "a\\x1b[31m\\n\\u202e[red]é"
    assert [byte_text(size) for size in (0, 999, 1000, 497_759_232)] == ["0 B", "999 B", "1.0 kB", "497.8 MB"]
