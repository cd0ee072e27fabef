"""Training that goes astray, Ctrl-C, and a reader that goes away: one line, and what was reached is kept."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from serving.bundle import open_bundle
from serving.cli import run
from tests.tiny_build import Fails, TinyBuild

# Training that goes astray.

ASTRAY = (
    "training.optimizer=adamw", "training.learning_rate=1", "training.max_grad_norm=1e38", "training.weight_decay=10",
    "training.warmup_fraction=0", "training.adam_beta2=0", "training.epochs=1",
)  # fmt: skip
# The step at which the loss stops being a number depends on the processor.
OFTEN = "training.validations=28"


def checkpoint(tiny: TinyBuild) -> dict[str, str] | None:
    path = tiny.run / "train" / "checkpoint" / "checkpoint.safetensors"
    if not path.exists():
        return None
    with safe_open(path, framework="np") as file:
        metadata: dict[str, str] = file.metadata()
        return metadata


def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(fails: Fails, fresh: TinyBuild) -> None:
    # Which loss is the first, that of training or of validation, depends on the processor too.
    line = fails(fresh.build(*ASTRAY, OFTEN), 1, "loss is not a number at step", "training.learning_rate")
    assert not (fresh.run / "train" / "stage.json").exists() and not fresh.bundle.exists()
    kept = checkpoint(fresh)
    assert kept is not None and 0 < int(kept["step"]) < int(line.partition("at step ")[2].split()[0])
    losses = [row["validation_loss"] for row in json.loads(kept["history"])]
    assert losses and all(loss < 1e9 for loss in losses)
    # And again: it goes on from there, and fails in the same way.
    assert fails(fresh.build(*ASTRAY, OFTEN), 1) == line
    assert checkpoint(fresh) == kept


def test_a_validation_that_is_no_number_is_no_checkpoint(
    fails: Fails, tiny: TinyBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    from builder.training.trainer import LanguageModel

    shutil.rmtree(tiny.run / "train")
    real, count = LanguageModel.evaluate, [0]

    def evaluate(self: Any, *arguments: Any, **options: Any) -> Any:
        count[0] += 1
        logs = real(self, *arguments, **options)
        return logs | {"perplexity": float("nan")} if count[0] == 2 else logs

    monkeypatch.setattr(LanguageModel, "evaluate", evaluate)
    fails(["train", *tiny.options()], 1, "not a number at step 4 of 6", "the checkpoint of step 2 is kept")
    kept = checkpoint(tiny)
    assert kept is not None and kept["step"] == "2"


def test_without_a_checkpoint_none_is_said_to_be_kept(fails: Fails, fresh: TinyBuild) -> None:
    line = fails(fresh.build(*ASTRAY, "training.validations=1"), 1, "the loss is not a number")
    assert checkpoint(fresh) is None and "is kept" not in line


# Ctrl-C, and a reader that goes away.


def start(arguments: list[str], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "serving.cli", *arguments], cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell's background process ignores Ctrl-C, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options,
    )  # fmt: skip


def interrupt(tiny: TinyBuild, words: str, delay: float = 0.0) -> None:
    with start(tiny.build()) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            if words in line:
                break
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert err == "error: interrupted; run the same command again to resume after the last completed stage\n"
    assert process.returncode == 130
    assert not tiny.bundle.exists()


@pytest.mark.parametrize(("words", "delay"), [("validation at step 2", 0.0), ("tokens:", 0.9)])
def test_an_interrupt_in_training_or_while_tensorflow_loads_is_one_line(
    fresh: TinyBuild, words: str, delay: float
) -> None:
    interrupt(fresh, words, delay)
    assert run(["prepare", *fresh.options()]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("words", ["corpus:", "tokens:", "model:", "exported onnx", "exported ort", "compared logits"])
@pytest.mark.parametrize("delay", [0.0, 0.3, 0.9])
def test_an_interrupt_anywhere_is_one_line(fresh: TinyBuild, words: str, delay: float) -> None:
    if words == "compared logits" and delay > 0:
        pytest.skip("it may have ended by then")
    interrupt(fresh, words, delay)
    assert run(fresh.build()) == 0
    open_bundle(fresh.bundle)


def test_a_command_without_stages_does_not_promise_to_go_on(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("serving.model.open_bundle", press)
    assert fails(["generate", "bundle", "x"], 130) == "error: interrupted\n"


def test_streams_that_are_closed_are_no_internal_error(built: TinyBuild) -> None:
    for prompt, closed, code in (("Return", 1, 0), ("-", 0, 2), ("Return", 2, 0)):
        arguments = [
            sys.executable,
            "-m",
            "serving.cli",
            "generate",
            str(built.bundle),
            prompt,
            "--max-new-tokens",
            "1",
        ]
        result = subprocess.run(
            arguments,
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            preexec_fn=partial(os.close, closed),
        )
        assert result.returncode == code and "internal error" not in result.stderr, result.stderr
        assert ("no standard input" in result.stderr) == (prompt == "-")


def test_a_reader_that_goes_away_gets_no_traceback(fresh: TinyBuild) -> None:
    with start(["prepare", *fresh.options()]) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
        process.wait(60)
    assert "Traceback" not in err and err.count("\n") <= 1
