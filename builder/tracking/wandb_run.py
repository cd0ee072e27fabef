"""A run in Weights & Biases, by its own client; WANDB_MODE=offline writes it to a folder on this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from builder.tracking.proofs import PROOFS

_EXIT_CODES = {"finished": 0, "failed": 1, "killed": 255}


class WandbRun:
    """The run with the ID `identity` in `project`."""

    def __init__(self, identity: str, name: str, project: str, parameters: Mapping[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        settings = wandb.Settings(console="off", disable_git=True, save_code=False, x_disable_stats=True)
        # A restart may change keys that only say what is logged.
        self._run = wandb.init(
            id=identity,
            resume="allow",
            name=name,
            project=project,
            config=dict(parameters),
            allow_val_change=True,
            settings=settings,
        )
        # Offline, a restart writes a second folder of the same run; what was sent is in the first.
        self.is_new = not (self._run.resumed or self._run.offline)
        # A step axis of our own: W&B's counts calls, and differs after a restart.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self.address = self._run.url or f"run {identity} in {Path(self._run.dir).parent}; send it by 'wandb sync'"

    def log(self, records: Sequence[Mapping[str, float]]) -> None:
        for record in records:
            self._run.log(dict(record))

    def figures(self, figures: Mapping[str, float]) -> None:
        self._run.summary.update(dict(figures))

    def bundle(self, folder: Path, mode: str) -> None:
        manifest = (folder / "manifest.json").read_bytes()
        metadata = {"bundle": folder.as_uri(), "manifest_sha256": hashlib.sha256(manifest).hexdigest()}
        artifact = self._wandb.Artifact(folder.name, type="model", metadata=metadata)
        if mode == "copy":
            artifact.add_dir(str(folder))
        else:
            artifact.add_reference(folder.as_uri())
            for name in PROOFS:
                artifact.add_file(str(folder / name), name=f"proofs/{name}")
        self._run.log_artifact(artifact)

    def finish(self, status: str) -> None:
        self._run.finish(exit_code=_EXIT_CODES[status])
