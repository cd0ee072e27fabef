"""A run in MLflow, by MLflow's own client: the server of MLFLOW_TRACKING_URI, or a store on this machine."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from builder.tracking.proofs import PROOFS

# MLflow's limits of one call, and of a parameter's value.
_METRICS, _PARAMETERS, _VALUE = 1000, 100, 6000
_IDENTITY = "gpt2_bundle.run"
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}


class MLflowRun:
    """A run in the experiment `project`, found again by its tag `gpt2_bundle.run` = `identity`."""

    def __init__(self, identity: str, name: str, project: str, parameters: Mapping[str, Any]) -> None:
        import mlflow
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, MlflowClient()
        experiment = self._client.get_experiment_by_name(project)
        place = experiment.experiment_id if experiment else self._client.create_experiment(project)
        runs = self._client.search_runs([place], f"tags.{_IDENTITY} = '{identity}'", max_results=1)
        self.is_new = not runs
        if runs:
            run = runs[0]
            self._client.update_run(run.info.run_id, status="RUNNING")
        else:
            run = self._client.create_run(place, run_name=name, tags={_IDENTITY: identity})
        self._id = run.info.run_id
        # A parameter cannot change. Keys that a restart may change only say what is logged.
        new = [
            Param(key, _text(value))
            for key, value in parameters.items()
            if key not in run.data.params and value not in ("", [])
        ]
        for start in range(0, len(new), _PARAMETERS):
            self._client.log_batch(self._id, params=new[start : start + _PARAMETERS])
        uri = re.sub(r"//[^/@]*@", "//", mlflow.get_tracking_uri())  # Without a password.
        web = uri.startswith(("http:", "https:"))
        self.address = f"{uri.rstrip('/')}/#/experiments/{place}/runs/{self._id}" if web else f"run {self._id} in {uri}"

    def log(self, records: Sequence[Mapping[str, float]]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            self._metric(key, float(value), now, int(record["step"]))
            for record in records
            for key, value in record.items()
            if key != "step"
        ]
        for start in range(0, len(metrics), _METRICS):
            self._client.log_batch(self._id, metrics=metrics[start : start + _METRICS])

    def figures(self, figures: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        # MLflow allows letters, digits and these characters in a name.
        metrics = [self._metric(re.sub(r"[^\w\-./ ]", "_", key), value, now, 0) for key, value in figures.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def bundle(self, folder: Path, mode: str) -> None:
        manifest = (folder / "manifest.json").read_bytes()
        self._client.set_tag(self._id, "gpt2_bundle.bundle", folder.as_uri())
        self._client.set_tag(self._id, "gpt2_bundle.manifest_sha256", hashlib.sha256(manifest).hexdigest())
        if mode == "copy":
            self._client.log_artifacts(self._id, str(folder), "bundle")
            return
        for name in PROOFS:
            self._client.log_artifact(self._id, str(folder / name), "bundle")

    def finish(self, status: str) -> None:
        self._client.set_terminated(self._id, _STATUS[status])


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _VALUE else text[: _VALUE - 1] + "…"
