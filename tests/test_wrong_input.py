"""What a person can get wrong, through the command line: one line that begins with "error: ", and the right exit code.

2 is for what was asked for wrongly, 1 for what failed. Nothing that was there before is touched.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from builder.recipe import Recipe
from builder.run_folder import locked, refuse_strangers
from builder.stages.run_keys import Run
from serving.cli import run
from tests.tiny_build import Fails, TinyBuild, contents, write_corpus

STAGES = ("prepare", "train", "export", "verify", "build")


# Recipes and options, the same for every command that takes them.


@pytest.mark.parametrize("command", STAGES)
def test_recipes(fails: Fails, built: TinyBuild, tmp_path: Path, command: str) -> None:
    common = [command, "--runs", str(tmp_path / "runs"), "--corpus", str(built.corpus)]
    (tmp_path / "binary.toml").write_bytes(bytes(range(256)))
    fails([*common, "--recipe", str(tmp_path / "none.toml")], 2, "no recipe at")
    fails([*common, "--recipe", str(tmp_path)], 2, "not a text file")
    fails([*common, "--recipe", str(tmp_path / "binary.toml")], 2, "not a text file")
    fails([*common, "--set", "training.epoch=3"], 2, "did you mean 'epochs'")
    fails([*common, "--set", "model.preset=gpt2-meduim"], 2, "'gpt2-medium'")
    fails([*common, "--set", "seed=abc"], 2, "takes an integer, not 'abc'")
    fails([*common, "--set", "nonsense"], 2, "write it as key=value")
    fails([*common, "--base", str(tmp_path / "none")], 2, "no such folder")
    fails([*common, "--nonsense"], 2, "No such option")
    fails([*common, "--set", "corpus.paths=[]", "--corpus", str(tmp_path / "none.txt")], 2, "none.txt")
    assert not (tmp_path / "runs" / "gpt2-docs" / "prepare" / "corpus").exists()


def test_commands_and_arguments(fails: Fails) -> None:
    fails(["biuld"], 2, "no command 'biuld'; did you mean 'build'?")
    fails(["inspect"], 2, "Missing argument")
    fails(["generate", "bundle"], 2, "Missing argument")
    fails(["--nonsense"], 2, "No such option")


# Text.


@pytest.mark.parametrize("command", ["prepare", "build"])
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", []),
        ("blank.txt", b" \n\t\n \n" * 50, []),
        ("binary.txt", bytes(range(256)) * 40, ["binary.txt"]),
        ("zeros.txt", bytes(4096), ["zeros.txt"]),
        ("line.txt", b"One line of text that is long enough to be kept.\n", ["characters"]),
        ("few.txt", b"One line of text.\nAnother line of text.\n", ["add text"]),
        ("broken.jsonl", b'{"text": "a fine text of some length"}\n{"text": \n', ["broken.jsonl"]),
        ("field.jsonl", b'{"body": "a fine text of some length"}\n', ["text"]),
        ("picture.png", b"\x89PNG\r\n\x1a\n" + bytes(99), ["picture.png"]),
        ("broken.txt.gz", b"\x1f\x8b\x08\x00 not really", ["broken.txt.gz"]),
    ],
)
def test_texts(
    fails: Fails, fresh: TinyBuild, tmp_path: Path, command: str, name: str, content: bytes, words: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    arguments = fresh.build() if command == "build" else ["prepare", *fresh.options()]
    arguments[arguments.index("--corpus") + 1] = str(tmp_path / name)
    fails(arguments, 2, *words)
    assert not (fresh.run / "prepare" / "stage.json").exists() and not fresh.bundle.exists()


def test_a_folder_without_text(fails: Fails, fresh: TinyBuild, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    fails(["prepare", *fresh.options(), "--set", "corpus.paths=[]", "--corpus", str(tmp_path / "folder")], 2, "folder")
    fails(["prepare", *fresh.options(), "--corpus", str(tmp_path / "*.none")], 2, "*.none")


# One stage before the other.


def test_stages_out_of_order(fails: Fails, fresh: TinyBuild, tiny: TinyBuild, tmp_path: Path) -> None:
    fresh = replace(fresh, runs=tmp_path / "other")
    fails(["train", *fresh.options()], 2, "run 'gpt2-bundle prepare'")
    fails(["export", *fresh.options()], 2, "run 'gpt2-bundle train'")
    fails(["verify", *fresh.options()], 2, "run 'gpt2-bundle export'")
    fails(["verify", *tiny.options()], 2, "run 'gpt2-bundle export'")
    fails(["train", *tiny.options("seed=5")], 2, "run 'gpt2-bundle prepare'")
    fails(["export", *tiny.options("training.learning_rate=0.5")], 2, "run 'gpt2-bundle train'")


def test_stages_go_on_with_what_was_read_when_the_corpus_changes_or_goes(
    tiny: TinyBuild, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = replace(tiny, corpus=write_corpus(tmp_path / "c.txt", 300))
    said = "the corpus has changed since it was read: the build continues with what was read"
    assert run(["prepare", *own.options()]) == 0
    with own.corpus.open("a") as file:
        file.write("One more line of text.\n")
    assert run(["train", *own.options()]) == 0
    assert said in capfd.readouterr().out
    own.corpus.unlink()
    assert run(["train", *own.options()]) == 0
    out = capfd.readouterr().out
    assert said in out and "train: done already" in out
    write_corpus(own.corpus, 300)
    assert run(["train", *own.options()]) == 0
    assert said not in capfd.readouterr().out


@pytest.mark.parametrize("command", STAGES)
def test_another_command_in_the_same_run(fails: Fails, tiny: TinyBuild, command: str) -> None:
    before = contents(tiny.runs)
    arguments = tiny.build("seed=5") if command == "build" else [command, *tiny.options("seed=5")]
    with locked(tiny.run):
        fails(arguments, 1, "another gpt2-bundle command works in", str(tiny.run))
    assert contents(tiny.runs) == before


@pytest.mark.parametrize("stage", ["prepare", "prepare/corpus", "train", "export"])
def test_a_stage_leaves_alone_what_it_did_not_write(fails: Fails, tiny: TinyBuild, tmp_path: Path, stage: str) -> None:
    (tiny.run / stage).mkdir(parents=True, exist_ok=True)
    (tiny.run / stage / "train.py").write_text("print('mine')")
    before = contents(tiny.runs)
    command = "prepare" if stage == "prepare/corpus" else "build"
    arguments = tiny.build("seed=5") if command == "build" else ["prepare", *tiny.options("seed=5")]
    fails(arguments, 2, "train.py did not come from this stage", str(tiny.run / stage))
    after = contents(tiny.runs)
    assert {name: after.get(name) for name in before if name.endswith("train.py")} == {
        f"tiny/{stage}/train.py": b"print('mine')"
    }
    if command == "build":
        assert after == before


def test_every_file_of_a_build_is_named_by_its_stage(built: TinyBuild) -> None:
    """Else the next build would refuse its own work."""
    run = Run(Recipe(name="tiny"), built.run)
    for folder, writes, keeps in run.stage_files():
        refuse_strangers(folder, writes, keeps)


# Options of generate.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--temperature", "-1"], ["temperature"]),
        (["--temperature", "nan"], ["temperature"]),
        (["--temperature", "inf"], ["temperature"]),
        (["--temperature", "hot"], ["--temperature"]),
        (["--top-k", "-1"], ["top_k"]),
        (["--top-k", "1.5"], ["--top-k"]),
        (["--top-p", "0"], ["top_p"]),
        (["--top-p", "1.5"], ["top_p"]),
        (["--top-p", "nan"], ["top_p"]),
        (["--max-new-tokens", "0"], ["max_new_tokens"]),
        (["--max-new-tokens", "-4"], ["max_new_tokens"]),
        (["--seed", "x"], ["--seed"]),
        (["--seed", "9" * 30], ["seed"]),
        (["--stop", ""], ["stop"]),
        (["--runtime", "onxn"], ["no runtime 'onxn'", "'onnx'"]),
        (["--graph", "ort/fp23"], ["'ort/fp32'"]),
        (["--graph", "savedmodel/prefill"], ["--runtime tensorflow"]),
        (["--graph", "savedmodel"], ["--runtime tensorflow"]),
        (["--graph", "ort/fp32", "--runtime", "tensorflow"], ["--runtime onnx"]),
    ],
)
def test_options_of_generate(fails: Fails, built: TinyBuild, options: list[str], words: list[str]) -> None:
    fails(["generate", str(built.bundle), "Return", *options], 2, *words)


def test_a_prompt_longer_than_the_context(fails: Fails, built: TinyBuild) -> None:
    fails(["generate", str(built.bundle), "Return the " * 50], 2, "context of 48")


def test_errors_come_from_the_command_itself_too(built: TinyBuild, tmp_path: Path) -> None:
    """The same through a process of its own: TensorFlow prints nothing of its own, and the exit codes arrive."""
    for arguments, code in (
        (["inspect", str(tmp_path)], 1),
        (["inspect", str(tmp_path / "none")], 2),
        (["generate", str(built.bundle), "Return", "--temperature", "-1"], 2),
        (["generate", str(built.bundle), "Return " * 50, "--runtime", "tensorflow"], 2),
    ):
        command = [sys.executable, "-m", "serving.cli", *arguments]
        result = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60)
        assert (result.returncode, result.stdout) == (code, "")
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
