"""Training checkpoints: weights under their Hugging Face names and the optimizer's state, in one safetensors file.

A checkpoint appears whole or not at all: it is written under a temporary name and renamed. Its metadata names
its step and its run, so that state of another recipe is never resumed. `checkpoint.safetensors` is the
newest; older ones that a recipe keeps are `checkpoint-STEP.safetensors`, and the first whole one is resumed.
`best.safetensors` holds the weights, without the optimizer, of the validation with the lowest loss.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from builder.model.gpt2 import GPT2, random_states, stored_variables

FILE = "checkpoint.safetensors"
BEST = "best.safetensors"


@dataclass(frozen=True)
class Progress:
    """How far a run had come: finished steps, and the report's rows so far."""

    step: int
    history: list[dict[str, Any]]

    @property
    def best(self) -> int:
        """Index of the history's row with the lowest validation loss, the first of equals."""
        return min(range(len(self.history)), key=lambda index: float(self.history[index]["validation_loss"]))

    @property
    def stale(self) -> int:
        """Validations since the best one."""
        return len(self.history) - 1 - self.best if self.history else 0


def training_state(model: GPT2, optimizer: Any) -> dict[str, Any]:
    """The variables that a run resumes from, by their names in a checkpoint."""
    state: dict[str, Any] = dict(stored_variables(model))
    state |= {f"random.{index}": variable for index, variable in enumerate(random_states(model))}
    return state | {f"optimizer.{index}": variable for index, variable in enumerate(optimizer.variables)}


def save_checkpoint(folder: Path, model: GPT2, optimizer: Any, run_id: str, progress: Progress, kept: int = 1) -> None:
    """Make the present state the folder's newest checkpoint, atomically, and leave `kept` of them."""
    metadata = {"run_id": run_id, "step": str(progress.step), "history": json.dumps(progress.history)}
    partial = _write(folder / FILE, training_state(model, optimizer), metadata)
    newest = folder / FILE
    before = _step_of(newest, run_id)
    if kept > 1 and before >= 0:
        # Between the two renamings there is no newest, and the older ones are looked at.
        newest.replace(folder / f"checkpoint-{before:09d}.safetensors")
    partial.replace(newest)
    ours = [path for path in _older(folder) if _step_of(path, run_id) >= 0]
    for path in set(_older(folder)) - set(ours[: kept - 1]):
        path.unlink()


def load_checkpoint(
    folder: Path, model: GPT2, optimizer: Any, run_id: str, *, with_best: bool = False
) -> Progress | None:
    """Restore model and optimizer from the folder's newest whole checkpoint and return its progress.

    Returns None, and changes nothing, where there is no checkpoint, or one of another run or shape, or a broken one;
    and, `with_best`, one whose best weights are gone.
    """
    state = training_state(model, optimizer)
    # An older checkpoint may have newer best weights next to it: what follows it will write those again.
    best = _step_of(folder / BEST, run_id) if with_best else -1
    for path in (folder / FILE, *_older(folder)):
        held = _read(path, state, run_id)
        if held is None:
            continue
        arrays, metadata = held
        progress = Progress(int(metadata["step"]), json.loads(metadata["history"]))
        if with_best and progress.history and best < progress.history[progress.best]["step"]:
            continue
        for name, variable in state.items():
            variable.assign(arrays[name])
        return progress
    return None


def save_best(folder: Path, model: GPT2, run_id: str, step: int) -> None:
    """Replace the folder's best weights by the model's, atomically."""
    path = folder / BEST
    _write(path, dict(stored_variables(model)), {"run_id": run_id, "step": str(step)}).replace(path)


def load_best(folder: Path, model: GPT2, run_id: str, step: int) -> bool:
    """Give `model` the best weights of `run_id`; return False, and change nothing, unless they are of `step`."""
    state = dict(stored_variables(model))
    held = _read(folder / BEST, state, run_id)
    if held is None or held[1].get("step") != str(step):
        return False
    for name, variable in state.items():
        variable.assign(held[0][name])
    return True


def _write(path: Path, state: dict[str, Any], metadata: dict[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.asarray(variable) for name, variable in state.items()}
    partial = path.with_name(path.name + ".partial")
    save_file(arrays, partial, metadata=metadata)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    return partial


def _read(path: Path, state: dict[str, Any], run_id: str) -> tuple[dict[str, Any], dict[str, str]] | None:
    """The arrays and metadata of a whole file of `run_id` that fits `state`, else None."""
    try:
        with safe_open(path, framework="np") as file:
            metadata: dict[str, str] = file.metadata() or {}
            if metadata.get("run_id") != run_id or set(file.keys()) != set(state):
                return None
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (FileNotFoundError, SafetensorError):
        return None
    if any(arrays[name].shape != tuple(variable.shape) for name, variable in state.items()):
        return None
    return arrays, metadata


def _older(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*.safetensors"), reverse=True)


def _step_of(path: Path, run_id: str) -> int:
    """The step that a file is of; -1 where it is broken, missing or of another run than `run_id`."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            return int(metadata["step"]) if metadata.get("run_id") == run_id else -1
    except (FileNotFoundError, KeyError, ValueError, SafetensorError):
        return -1
