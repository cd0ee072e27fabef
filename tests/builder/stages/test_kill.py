"""Builds that are killed: what is published stays whole, and the next build goes on and ends in the same weights."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from builder.run_folder import is_done
from serving.bundle import open_bundle
from tests.tiny_build import TinyBuild

ROOT = Path(__file__).parents[3]


def kills(folder: Path, every: int) -> int:
    result = subprocess.run(
        [sys.executable, "-m", "tests.kill_points", str(folder), str(every)],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["wrong"] == []
    return int(record["kills"])


def test_a_kill_at_some_steps_of_the_stages_and_of_publishing_harms_nothing(tmp_path: Path) -> None:
    assert kills(tmp_path, 6) > 20


@pytest.mark.slow
def test_a_kill_at_any_step_of_the_stages_and_of_publishing_harms_nothing(tmp_path: Path) -> None:
    assert kills(tmp_path, 1) > 200


# The real thing, in a process of its own.


def start(tiny: TinyBuild) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "serving.cli", *tiny.build()],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def kill_after_line(tiny: TinyBuild, words: str) -> list[str]:
    """Start a build and kill it when it says `words`; return what it said until then."""
    with start(tiny) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if words in line:
                process.send_signal(signal.SIGKILL)
                process.wait(30)
                assert_nothing_is_half_published(tiny)
                return lines
        process.wait(30)
    raise AssertionError(f"never said {words!r}: {lines}")


def assert_nothing_is_half_published(tiny: TinyBuild) -> None:
    if tiny.dist.exists():
        assert [entry.name for entry in tiny.dist.iterdir()] in ([], ["tiny"])
        if tiny.bundle.exists():
            open_bundle(tiny.bundle)


def finish(tiny: TinyBuild) -> str:
    with start(tiny) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err == ""
    return out


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def checkpoint_step(tiny: TinyBuild) -> int:
    with safe_open(tiny.run / "train" / "checkpoint" / "checkpoint.safetensors", framework="np") as file:
        return int(file.metadata()["step"])


@pytest.fixture
def fresh(built: TinyBuild, tmp_path: Path) -> TinyBuild:
    """The recipe of the uninterrupted build, with nothing done yet."""
    return TinyBuild(built.corpus, tmp_path / "runs", tmp_path / "dist")


@pytest.mark.slow
def test_a_training_that_was_killed_goes_on_from_its_checkpoint_to_the_same_weights(
    built: TinyBuild, fresh: TinyBuild
) -> None:
    said = "".join(kill_after_line(fresh, "validation at step 4"))
    assert "validation at step 2 of 6" in said
    assert not (fresh.run / "train" / "model.safetensors").exists()
    assert checkpoint_step(fresh) == 4
    out = finish(fresh)
    assert "prepare: done already" in out
    assert "validation at step 2 " not in out and "validation at step 4 " not in out, "training began anew"
    assert "validation at step 6 of 6" in out
    # Bit for bit what an uninterrupted training in another process gave, and so is the report of it.
    assert weights(fresh.bundle) == weights(built.bundle)
    reports = [json.loads((each.run / "train" / "training.json").read_text()) for each in (fresh, built)]
    for report in reports:
        assert [row["step"] for row in report["history"]] == [2, 4, 6]
        for row in report["history"]:
            del row["tokens_per_second"]
    assert reports[0] == reports[1]


@pytest.mark.slow
def test_an_export_that_was_killed_is_thrown_away_and_made_anew(built: TinyBuild, tmp_path: Path) -> None:
    tiny = built.copy(tmp_path)
    (tiny.bundle / "README.md").write_text("damaged, so that it is built anew")
    with start(tiny) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "exported onnx/model.onnx" in line:
                process.send_signal(signal.SIGKILL)
                break
    draft = tiny.run / "export" / "bundle"
    assert (draft / "onnx" / "model.onnx").exists() and not (draft / "manifest.json").exists()
    assert (tiny.bundle / "README.md").read_text().startswith("damaged"), "touched before the new one was proven"
    out = finish(tiny)
    assert "train: done already" in out and "exported onnx/model.onnx" in out
    assert weights(open_bundle(tiny.bundle).folder) == weights(built.bundle)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "corpus:", "tokenizer:", "tokens:", "model:", "validation at step 2", "validation at step 6",
        "validation perpl",
        "exported ort/fp32", "exported savedmodel", "compared logits", "compared greedy", "compared perplexity",
        "published",
    ],
)  # fmt: skip
def test_a_kill_at_any_line(built: TinyBuild, fresh: TinyBuild, words: str) -> None:
    kill_after_line(fresh, words)
    trained = (fresh.run / "train" / "stage.json").exists()
    out = finish(fresh)
    assert ("train: done already" in out or "already, and whole" in out) == trained
    assert_nothing_is_half_published(fresh)
    assert weights(fresh.bundle) == weights(built.bundle)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_kills_at_random_times_one_after_the_other(built: TinyBuild, fresh: TinyBuild, seed: int) -> None:
    choose = random.Random(seed)
    for _ in range(choose.randint(1, 4)):
        with start(fresh) as process:
            time.sleep(choose.uniform(0.1, 14.0))
            process.send_signal(signal.SIGKILL)
        assert_nothing_is_half_published(fresh)
    finish(fresh)
    assert_nothing_is_half_published(fresh)
    assert weights(fresh.bundle) == weights(built.bundle)
    assert is_done(fresh.run / "prepare", json.loads((fresh.run / "prepare" / "stage.json").read_text())["key"])
