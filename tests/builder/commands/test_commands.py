"""The builder's commands: their options become a recipe, each runs its own stage and holds the run while it does."""

from __future__ import annotations

import json
import shlex
import types
from pathlib import Path
from typing import Any

import pytest

from builder.commands.options import make_run
from builder.data import content_hashes
from builder.recipe import Recipe
from builder.run_folder import locked
from builder.stages import pipeline as builds
from builder.stages.run_keys import Run
from serving.cli import run
from serving.errors import GPT2BundleError
from tests.tiny_build import TinyBuild

STAGES = {"prepare": "prepare_stage", "train": "train_stage", "export": "export_stage"}


def test_options_become_a_recipe_and_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('name = "from-file"\n[training]\nepochs = 2\n')
    ours = make_run(path, ("training.epochs=1",), "some/base", ("a b.txt", 'q"uote.txt', "*.md"), tmp_path / "runs")
    assert ours.folder == tmp_path / "runs" / "from-file"
    assert ours.recipe.training.epochs == 1 and ours.recipe.model.base == "some/base"
    assert ours.recipe.corpus.paths == ("a b.txt", 'q"uote.txt', "*.md")
    assert make_run(None, (), None, (), Path("runs")) == Run(Recipe(), Path("runs/gpt2-docs"))


def test_the_short_options_win_over_the_file_and_may_hold_anything(tmp_path: Path) -> None:
    for name in ("café", "back\\slash", "tab\there", "[x]", "true", "3"):
        ours = make_run(None, ("corpus.paths=other",), name, (name,), tmp_path)
        assert (ours.recipe.model.base, ours.recipe.corpus.paths) == (name, (name,))


@pytest.mark.parametrize("command", STAGES)
def test_a_command_runs_its_stage_under_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    ran: list[str] = []

    def stage(name: str) -> Any:
        def work(ours: Run, reporter: Any, *options: Any) -> None:
            ran.append(name)
            with pytest.raises(GPT2BundleError), locked(ours.folder):
                pass

        return work

    for name, attribute in STAGES.items():
        monkeypatch.setattr(builds, attribute, stage(name))
    assert run([command, "--runs", str(tmp_path), "--set", "name=x"]) == 0
    assert ran == [command]
    with locked(tmp_path / "x"):
        pass


def test_build_gives_json_or_a_hint_that_can_be_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake(ours: Run, output: Path, *rest: Any) -> Any:
        manifest = types.SimpleNamespace(
            total_size=5, quality={"validation_perplexity": 2.0}, parity={"verified": True}
        )
        return types.SimpleNamespace(folder=output / ours.recipe.name, manifest=manifest)

    monkeypatch.setattr(builds, "build", fake)
    arguments = ["build", "--runs", str(tmp_path), "--output", str(tmp_path / "two words")]
    assert run(arguments) == 0
    hint = capsys.readouterr().out.strip().removeprefix("try it: ")
    assert shlex.split(hint)[:3] == ["gpt2-bundle", "generate", str(tmp_path / "two words" / "gpt2-docs")]
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "bundle": str(tmp_path / "two words" / "gpt2-docs"),
        "size": 5,
        "quality": {"validation_perplexity": 2.0},
        "tracking": {},
        "parity": {"verified": True},
    }


@pytest.mark.parametrize("command", ["prepare", "train", "export", "verify", "build"])
def test_help_names_the_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    out = capsys.readouterr().out
    for option in ("--recipe", "--set", "--base", "--corpus", "--runs"):
        assert option in out


def test_stages_that_are_done_say_so(tiny: TinyBuild, capfd: pytest.CaptureFixture[str]) -> None:
    for command in ("prepare", "train"):
        assert run([command, *tiny.options()]) == 0
        out, err = capfd.readouterr()
        assert f"{command}: done already" in out and err == ""


def test_a_default_build_reads_pythons_own_docstrings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No corpus, no recipe: the key is of the running Python, and nothing is looked for on disk or elsewhere."""
    monkeypatch.chdir(tmp_path)
    ours = make_run(None, (), None, (), Path("runs"))
    before = ours.prepare_key()
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    assert ours.prepare_key() == before  # Fixed when the run began.
    content_hashes._library_hash.cache_clear()
    try:
        assert make_run(None, (), None, (), Path("runs")).prepare_key() != before
    finally:
        content_hashes._library_hash.cache_clear()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_train_takes_the_loop_that_was_asked_for(fresh: TinyBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    from builder.training import trainer

    asked = []
    original = trainer.run_epochs

    def spy(*arguments: Any, **options: Any) -> Any:
        asked.append("custom")
        return original(*arguments, **options)

    monkeypatch.setattr(trainer, "run_epochs", spy)
    assert run(["prepare", *fresh.options()]) == 0
    assert run(["train", *fresh.options(), "--loop", "custom"]) == 0
    assert asked == ["custom"]
    # Both give the same weights but for rounding, so what one has trained is not trained again by the other.
    assert run(["train", *fresh.options(), "--loop", "fit"]) == 0
    assert run(["train", *fresh.options(), "--loop", "fit", "--set", "training.learning_rate=0.02"]) == 0
    assert asked == ["custom"]


@pytest.mark.parametrize("option", [("--corpus", "notes"), ("--base", "gpt2"), ("--runs", "elsewhere")])
def test_verify_refuses_what_a_published_bundle_does_not_read(
    option: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(tmp_path), *option]) == 2
    assert f"{option[0]} is for a recipe's draft; leave it out, or BUNDLE" in capsys.readouterr().err
