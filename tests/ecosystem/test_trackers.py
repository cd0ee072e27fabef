"""A build that is killed and resumed, as MLflow and Weights & Biases have it: by their own clients, offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from builder.training.metrics_log import read_metrics
from tests.ecosystem.conftest import ROOT, python_of
from tests.tiny_build import TinyBuild, write_corpus

pytestmark = pytest.mark.ecosystem
TOOLS = (
    "tracking.tools=['mlflow', 'wandb']",
    "tracking.project=tests",
    "training.epochs=1",
    "training.log_every=2",
    "export.slots=0",
)


class Tracked:
    """A folder with a build, MLflow's database, and W&B's files."""

    def __init__(self, folder: Path) -> None:
        self.python = python_of("trackers")
        self.folder = folder
        self.build = TinyBuild(write_corpus(folder / "corpus.txt"), folder / "runs", folder / "dist")
        (packages,) = self.python.parents[1].glob("lib/python*/site-packages")
        self.store = f"sqlite:///{folder}/mlflow.db"
        self.environment = os.environ | {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{packages}",
            "MLFLOW_TRACKING_URI": self.store,
            "WANDB_MODE": "offline",
            "HOME": str(folder),
        }

    def start(self, *settings: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "serving.cli", *self.build.build(*TOOLS, *settings)]
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def finish(self, *settings: str) -> str:
        build = self.start(*settings)
        out, err = build.communicate(timeout=900)
        assert build.returncode == 0, err
        assert "tracking:" not in out, out
        return out

    def _read(self, script: str, *words: str) -> list[dict[str, Any]]:
        command = [str(self.python), str(ROOT / "tests/ecosystem" / script), *words]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def mlflow(self) -> list[dict[str, Any]]:
        return self._read("mlflow_records.py", self.store, "tests")

    def wandb(self) -> list[dict[str, Any]]:
        return self._read("wandb_records.py", str(self.folder / "wandb"))


def test_a_killed_and_resumed_build_is_one_run_in_both(tmp_path: Path) -> None:
    tracked = Tracked(tmp_path)
    trained = tracked.build.run / "train"
    with tracked.start() as build:
        for _ in range(6000):
            validated = [record for record in read_metrics(trained) if "validation_loss" in record]
            states = [tracked.build.run / f"tracking/{tool}.json" for tool in ("mlflow", "wandb")]
            sent = [path.exists() and "validation_loss" in path.read_text() for path in states]
            if validated and all(sent):
                break
            assert build.poll() is None, build.communicate()
            time.sleep(0.1)
        build.kill()
    time.sleep(5)  # The trackers' processes close their runs.
    out = tracked.finish()
    assert f"mlflow: run {tracked.mlflow()[0]['id']} in {tracked.store}\n" in out and "\nwandb: run " in out

    logged = read_metrics(trained)
    expected = [(key, record["step"], value) for record in logged for key, value in record.items() if key != "step"]
    manifest = json.loads((tracked.build.bundle / "manifest.json").read_text())
    # Times differ between the two starts; every other figure is that of the run without a kill.
    exact = {(key, step): value for key, step, value in expected if key != "tokens_per_second"}

    (run,) = tracked.mlflow()
    assert run["status"] == "FINISHED" and run["name"] == "tiny"
    assert run["parameters"]["model.n_embd"] == "32" and run["parameters"]["training.log_every"] == "2"
    got = {(name, step): value for name, values in run["metrics"].items() for step, value in values}
    assert {place: got[place] for place in exact} == exact
    for name, values in run["metrics"].items():
        assert max(Counter(step for step, _ in values).values()) == 1, name
    assert got["quality/validation_loss", 0] == manifest["quality"]["validation_loss"]
    assert got["certificate/max_abs/ort/fp32", 0] == manifest["parity"]["max_abs"]["ort/fp32"]
    assert run["tags"]["gpt2_bundle.bundle"] == tracked.build.bundle.resolve().as_uri()
    assert run["artifacts"] == ["bundle/README.md", "bundle/manifest.json", "bundle/verification.json"]

    files = tracked.wandb()
    assert len(files) == 2 and len({file["id"] for file in files}) == 1
    history = [(key, row["step"], value) for file in files for row in file["history"] for key, value in row.items()
               if key != "step" and not key.startswith("_")]  # fmt: skip
    assert len(history) == len(expected)
    assert {(key, step): value for key, step, value in history if key != "tokens_per_second"} == exact
    last = files[-1]
    assert last["name"] == "tiny" and last["project"] == "tests" and last["exit_code"] == 0
    assert last["parameters"]["model.n_embd"] == 32
    assert last["summary"]["quality/validation_loss"] == manifest["quality"]["validation_loss"]
    (artifact,) = last["artifacts"]
    assert artifact["name"] == "tiny"
    assert {reference.rpartition("/tiny/")[2] for reference in artifact["refs"]} == {
        "manifest.json", *(each["path"] for each in manifest["artifacts"]),
    }  # fmt: skip


def test_the_bundle_is_copied_when_asked(tmp_path: Path) -> None:
    tracked = Tracked(tmp_path)
    tracked.finish("tracking.bundle=copy", "training.epochs=0.1")
    manifest = json.loads((tracked.build.bundle / "manifest.json").read_text())
    paths = {"manifest.json", *(each["path"] for each in manifest["artifacts"])}
    (run,) = tracked.mlflow()
    (copy,) = (tmp_path / "mlruns").rglob("bundle")
    assert {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()} == paths
    assert "bundle/manifest.json" in run["artifacts"]
    (artifact,) = tracked.wandb()[-1]["artifacts"]
    assert set(artifact["paths"]) == paths and artifact["refs"] == []
