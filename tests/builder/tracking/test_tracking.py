"""What trackers get of a build, and that one which is missing, refuses, hangs or dies costs it a line at most."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builder.recipe import Recipe, TrackingRecipe
from builder.tracking.session import Tracking, parameters, tracked
from serving.cli import run
from tests.tiny_build import TinyBuild

EMULATOR = Path(__file__).parent / "emulator"
ROOT = Path(__file__).parents[3]
RECORDS = [
    {"step": 1, "loss": 3.0, "tokens_per_second": 9.0},
    {"step": 2, "loss": 2.0},
    {"step": 2, "validation_loss": 2.5},
]
Calls = Callable[[], list[Any]]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """An emulated MLflow; gives what was called so far."""
    file = tmp_path / "calls.jsonl"
    monkeypatch.syspath_prepend(EMULATOR)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EMULATOR), str(ROOT)]))
    monkeypatch.setenv("EMULATOR_FILE", str(file))
    return lambda: [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def recipe(**options: Any) -> Recipe:
    return Recipe(tracking=TrackingRecipe(tools=("mlflow",), **options))


def track(folder: Path, key: str = "k", timeout: float = 30.0, said: list[str] | None = None) -> float:
    """A build that tells three records and ends; gives the seconds that this took."""
    start = time.monotonic()
    with tracked(recipe(timeout=timeout), folder, (said if said is not None else []).append) as tracking:
        tracking.start(key)
        tracking.log(RECORDS)
    return time.monotonic() - start


def metrics(calls: list[Any]) -> list[Any]:
    return [each for call in calls if call[0] == "metrics" for each in call[1]]


def test_a_tracker_gets_recipe_metrics_and_end(calls: Calls, tmp_path: Path) -> None:
    said: list[str] = []
    track(tmp_path, said=said)
    assert said == []
    got = calls()
    sent = dict(pair for call in got if call[0] == "parameters" for pair in call[1])
    assert sent["training.epochs"] == "4.0" and sent["export.variants"] == '["int8", "int4"]'
    assert not any(name.startswith("tracking") for name in sent)
    assert metrics(got) == [
        ["loss", 3.0, 1],
        ["tokens_per_second", 9.0, 1],
        ["loss", 2.0, 2],
        ["validation_loss", 2.5, 2],
    ]
    assert got[-1] == ["end", "FINISHED"]


def test_the_address_has_no_password(calls: Calls, tmp_path: Path) -> None:
    track(tmp_path)
    assert Tracking(recipe(), tmp_path, print).addresses("k") == {"mlflow": "https://emulator/#/experiments/1/runs/r"}
    assert Tracking(recipe(), tmp_path, print).addresses("other") == {}


def test_a_restart_continues_the_run_and_repeats_no_step(calls: Calls, tmp_path: Path) -> None:
    track(tmp_path)
    track(tmp_path)
    assert [call[0] for call in calls()].count("create") == 1 and ["update", "RUNNING"] in calls()
    assert len(metrics(calls())) == 4
    track(tmp_path, key="another recipe")
    assert [call[0] for call in calls()].count("create") == 2 and len(metrics(calls())) == 8


def test_a_run_that_the_tracker_lost_is_made_and_sent_again(calls: Calls, tmp_path: Path) -> None:
    track(tmp_path)
    Path(os.environ["EMULATOR_FILE"]).unlink()
    track(tmp_path)
    assert len(metrics(calls())) == 4


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow").mkdir()  # A folder of that name, such as ./wandb, is not the package.
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("builder.tracking.session.importlib.util.find_spec", _without_mlflow)
    said: list[str] = []
    assert track(tmp_path, said=said) < 1
    install = "pip install 'gpt2-bundle[mlflow]'"
    assert said == [f"tracking: mlflow is not installed ({install}); the build continues without it"]


def _without_mlflow(name: str) -> Any:
    from importlib.machinery import ModuleSpec

    return ModuleSpec(name, None)  # As Python describes a folder without files.


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ("import", "libemulator.so.1"),
        ("refuse", "the emulator refuses all connections"),
        ("exit", "its process ended (the emulator gives up)"),
    ],
)
def test_a_tracker_that_fails_is_said_in_lines(
    failure: str, words: str, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMULATOR_FAILURE", failure)
    said: list[str] = []
    assert track(tmp_path, said=said) < 25
    assert said and len(said) <= 2
    for line in said:
        assert "\n" not in line and line.startswith("tracking: mlflow: ") and line.endswith("; the build continues")
        assert words in line


def test_a_tracker_that_hangs_is_ended(calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMULATOR_FAILURE", "hang")
    said: list[str] = []
    seconds = track(tmp_path, timeout=3.0, said=said)
    assert 3 <= seconds < 8
    assert said == ["tracking: mlflow: did not finish in time (tracking.timeout) and was ended; the build continues"]


def test_a_tracker_that_hangs_takes_no_time_from_steps(
    calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMULATOR_FAILURE", "hang")
    said: list[str] = []
    with tracked(recipe(timeout=1.0), tmp_path, said.append) as tracking:
        tracking.start("k")
        start = time.monotonic()
        for step in range(30_000):  # More than the pipe and both queues hold.
            tracking.log([{"step": step, "loss": 1.0}])
        assert time.monotonic() - start < 5
    assert any("takes nothing in" in line for line in said)


def test_what_a_tracker_refused_once_is_sent_again(
    calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMULATOR_FAILURE", "once")
    said: list[str] = []
    track(tmp_path, said=said)
    assert said == ["tracking: mlflow: the emulator is away; the build continues"]
    assert len(metrics(calls())) == 4 and calls()[-1] == ["end", "FINISHED"]


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_build_that_ends_early_is_marked(
    error: type[BaseException], status: str, calls: Calls, tmp_path: Path
) -> None:
    with pytest.raises(error), tracked(recipe(), tmp_path, print) as tracking:
        tracking.start("k")
        tracking.log(RECORDS)
        time.sleep(2)
        raise error
    assert calls()[-1] == ["end", status]


def test_a_killed_build_leaves_no_process_and_a_closed_run(calls: Calls, tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path\n"
        "from builder.recipe import Recipe, TrackingRecipe; from builder.tracking.session import Tracking\n"
        "tracking = Tracking(Recipe(tracking=TrackingRecipe(tools=('mlflow',))), Path(sys.argv[1]), print)\n"
        "tracking.start('k'); tracking.log([{'step': 1, 'loss': 1.0}]); print('told', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE) as build:
        assert build.stdout is not None and build.stdout.readline() == b"told\n"
        for _ in range(200):
            if metrics(calls()):
                break
            time.sleep(0.1)
        build.send_signal(signal.SIGKILL)
    for _ in range(100):
        if calls()[-1] == ["end", "KILLED"]:
            break
        time.sleep(0.1)
    assert calls()[-1] == ["end", "KILLED"] and metrics(calls()) == [["loss", 1.0, 1]]


def test_the_recipe_is_told_flat_and_without_the_trackers() -> None:
    told = parameters(recipe())
    assert told["name"] == "gpt2-docs" and told["corpus.paths"] == [] and told["verify.prompts"] == 64
    assert not any(name.startswith("tracking") for name in told)


def test_a_build_tells_metrics_figures_and_bundle(
    calls: Calls, tiny: TinyBuild, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(tiny.dist)
    assert run(tiny.build("tracking.tools=mlflow", "tracking.project=p")) == 0
    out = capfd.readouterr().out
    assert "mlflow: https://emulator/#/experiments/1/runs/r\n" in out
    got = calls()
    assert ["experiment", "p"] in got
    logged = [json.loads(line) for line in (tiny.run / "train/metrics.jsonl").read_text().splitlines()]
    manifest = json.loads((tiny.bundle / "manifest.json").read_text())
    told = metrics(got)
    for record in logged:
        for key, value in record.items():
            assert key == "step" or [key, value, record["step"]] in told
    assert ["quality/validation_loss", manifest["quality"]["validation_loss"], 0] in told
    assert ["certificate/verified", float(manifest["parity"]["verified"]), 0] in told
    largest = manifest["parity"]["max_abs"]["ort/fp32"]
    assert ["certificate/max_abs/ort/fp32", largest, 0] in told
    assert ["tag", "gpt2_bundle.bundle", tiny.bundle.resolve().as_uri()] in got
    assert ["artifact", "verification.json", "bundle"] in got and got[-1] == ["end", "FINISHED"]
    # The trackers leave no trace in the bundle.
    assert "tracking" not in manifest["provenance"]["recipe"]
    # A bundle that is whole is not built again; its run's address is known.
    assert run([*tiny.build("tracking.tools=mlflow", "tracking.project=p"), "--json"]) == 0
    record = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert record["tracking"] == {"mlflow": "https://emulator/#/experiments/1/runs/r"} and calls() == got


def test_a_build_whose_tracker_hangs_publishes_the_bundle(
    calls: Calls, tiny: TinyBuild, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EMULATOR_FAILURE", "hang")
    shutil.rmtree(tiny.dist)
    assert run(tiny.build("tracking.tools=mlflow", "tracking.timeout=1")) == 0
    assert (tiny.bundle / "manifest.json").is_file()
    out = capfd.readouterr().out
    assert "did not finish in time (tracking.timeout) and was ended; the build continues" in out
