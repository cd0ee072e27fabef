"""Two real worker processes: the model of one, one bundle, and runs that are killed and end in the same weights."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from serving.bundle import open_bundle
from serving.cli import run
from tests.tiny_build import TinyBuild, contents, write_corpus

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow
# Four checkpoints of 28 steps.
LONGER = ("training.epochs=2", "training.sample_tokens=0", "training.log_every=1")


def ports(count: int = 2) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [opened.getsockname()[1] for opened in sockets]


class Worker:
    """A worker in a process of its own, with the lines that it prints."""

    def __init__(self, arguments: list[str], index: int, places: list[int]) -> None:
        cluster = {"worker": [f"127.0.0.1:{port}" for port in places]}
        config = {"cluster": cluster, "task": {"type": "worker", "index": index}}
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "serving.cli", *arguments],
            cwd=ROOT,
            env=os.environ | {"TF_CONFIG": json.dumps(config), "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._new: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._collect, daemon=True).start()

    def _collect(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._new.put(line)
        self._new.put(None)

    def wait_for(self, words: str, timeout: float = 100) -> None:
        deadline = time.monotonic() + timeout
        while True:
            line = self._new.get(timeout=max(0.1, deadline - time.monotonic()))
            assert line is not None, (words, self.lines, self.end(5))
            self.lines.append(line)
            if words in line:
                return

    def printed(self) -> list[str]:
        """All lines, of a process that has ended."""
        while (line := self._new.get(timeout=10)) is not None:
            self.lines.append(line)
        return self.lines

    def end(self, timeout: float = 120) -> tuple[int, str]:
        """The exit code, and what went to standard error."""
        code = self.process.wait(timeout)
        assert self.process.stderr is not None
        return code, self.process.stderr.read()


@contextlib.contextmanager
def workers(tinies: list[TinyBuild], *overrides: str, command: str = "train") -> Iterator[list[Worker]]:
    places, started = ports(len(tinies)), []
    try:
        for index, tiny in enumerate(tinies):
            arguments = tiny.build(*overrides) if command == "build" else [command, *tiny.options(*overrides)]
            started.append(Worker(arguments, index, places))
        yield started
    finally:
        for worker in started:
            worker.process.kill()
            worker.process.wait(30)


def prepared(folder: Path, *overrides: str) -> list[TinyBuild]:
    """The chief's and the other worker's builds: the text is in one place, the tokens were copied to the other."""
    folder.mkdir(exist_ok=True)
    corpus = write_corpus(folder / "text.txt", 400)
    chief = TinyBuild(corpus, folder / "chief" / "runs", folder / "chief" / "dist")
    assert run(["prepare", *chief.options(*overrides)]) == 0
    other = chief.copy(folder / "other")
    for entry in other.run.iterdir():
        if entry.name != "prepare":
            entry.unlink()
    return [chief, other]


def finish(started: list[Worker]) -> None:
    for worker in started:
        assert worker.end() == (0, "")


def history(tiny: TinyBuild) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((tiny.run / "train" / "training.json").read_text())["history"]
    return found


def test_each_kind_of_step_gives_the_curve_of_one_worker(tmp_path: Path) -> None:
    places = ",".join(map(str, ports()))
    command = [sys.executable, "-m", "tests.builder.training.two_workers", str(tmp_path)]
    started = [
        subprocess.Popen(
            [*command, str(rank), places], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    try:
        ends = [process.communicate(timeout=230) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], [error[-2000:] for _, error in ends]
    for name, figures in json.loads(ends[0][0].splitlines()[-1]).items():
        assert figures["steps"] >= 8, name
        assert figures["losses"] < 1e-5 and figures["figures"] < 1e-5 and figures["logged"] < 1e-3, (name, figures)
        assert figures["weights"] < 2e-4 < 5e-3 < figures["moved"], (name, figures)


def test_two_workers_build_one_bundle_and_only_the_chief_writes(tmp_path: Path) -> None:
    tinies = prepared(tmp_path)
    before = contents(tmp_path / "other")
    with workers(tinies, command="build") as started:
        finish(started)
    assert contents(tmp_path / "other") == before
    open_bundle(tinies[0].bundle)
    alone = tinies[0].copy(tmp_path / "alone")
    shutil.rmtree(alone.dist)
    shutil.rmtree(alone.run / "train")
    assert run(["train", *alone.options()]) == 0
    for ours, theirs in zip(history(tinies[0]), history(alone), strict=True):
        for key in ("train_loss", "validation_loss"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5)
    # What is done already is not trained again, and the other worker ends too.
    with workers(tinies, command="build") as started:
        finish(started)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[TinyBuild], dict[str, Any]]:
    """Prepared tokens, and the weights of two workers with dropout that nothing interrupts."""
    folder = tmp_path_factory.mktemp("unbroken")
    settings = (*LONGER, "model.resid_pdrop=0.1")
    tinies = prepared(folder, *settings)
    whole = [tiny.copy(folder / f"whole-{index}") for index, tiny in enumerate(tinies)]
    with workers(whole, *settings) as started:
        finish(started)
    assert len(history(whole[0])) == 4
    return tinies, load_file(whole[0].run / "train" / "model.safetensors")


@pytest.mark.parametrize("killed", [0, 1])
def test_a_kill_ends_the_other_and_the_same_command_ends_in_the_same_weights(
    unbroken: tuple[list[TinyBuild], dict[str, Any]], tmp_path: Path, killed: int
) -> None:
    settings = (*LONGER, "model.resid_pdrop=0.1")
    tinies = [tiny.copy(tmp_path / f"worker-{index}") for index, tiny in enumerate(unbroken[0])]
    with workers(tinies, *settings) as started:
        started[0].wait_for("validation at step")
        started[killed].process.send_signal(signal.SIGKILL)
        since = time.monotonic()
        code, error = started[1 - killed].end(60)
        assert time.monotonic() - since < 30
    assert code == 1
    assert error.startswith(f"error: worker {killed} (127.0.0.1:") and error.count("\n") == 1, error
    assert error.endswith(" ended; run the same command on every machine, which resumes from the last checkpoint\n")
    assert not (tinies[0].run / "train" / "model.safetensors").exists()
    with workers(tinies, *settings) as started:
        finish(started)
        validated = [line for line in started[0].printed() if "validation at step" in line]
    assert len(validated) < 4, "not resumed"
    rows = [json.loads(line) for line in (tinies[0].run / "train" / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == list(range(1, history(tinies[0])[-1]["step"] + 1))
    weights = load_file(tinies[0].run / "train" / "model.safetensors")
    for name, array in unbroken[1].items():
        np.testing.assert_array_equal(weights[name], array, err_msg=name)


def test_a_worker_with_another_recipe_ends_both_before_the_first_step(tmp_path: Path) -> None:
    tinies, places = prepared(tmp_path), ports()
    started = []
    try:
        for index, (tiny, rate) in enumerate(zip(tinies, ("0.01", "0.02"), strict=True)):
            started.append(Worker(["train", *tiny.options(f"training.learning_rate={rate}")], index, places))
        ends = [worker.end(60) for worker in started]
    finally:
        for worker in started:
            worker.process.kill()
    assert [code for code, _ in ends] == [2, 1]
    for _, error in ends:
        assert error.count("\n") == 1
        assert "has training.learning_rate = 0.02, and worker 0 has 0.01; start every worker with the same" in error
    assert not (tinies[0].run / "train").exists()
