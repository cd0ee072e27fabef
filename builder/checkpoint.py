"""Training checkpoints: weights under their Hugging Face names and the optimiser's state, in one safetensors file.

A checkpoint appears whole or not at all: it is written beside its name and renamed. Its metadata says of which step
it is and which run it belongs to, so that another recipe's state is never taken up.
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

from builder.gpt2 import GPT2, named_variables

FILE = "checkpoint.safetensors"


@dataclass(frozen=True)
class Progress:
    """How far a run had come: finished steps, and the report's rows so far."""

    step: int
    history: list[dict[str, Any]]


def _state(model: GPT2, optimizer: Any) -> dict[str, Any]:
    named = dict(named_variables(model))
    return named | {f"optimizer.{index}": variable for index, variable in enumerate(optimizer.variables)}


def save_checkpoint(folder: Path, model: GPT2, optimizer: Any, run_id: str, progress: Progress) -> None:
    """Replace the folder's checkpoint by the present state, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.asarray(variable) for name, variable in _state(model, optimizer).items()}
    metadata = {"run_id": run_id, "step": str(progress.step), "history": json.dumps(progress.history)}
    partial = folder / (FILE + ".partial")
    save_file(arrays, partial, metadata=metadata)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(folder / FILE)


def load_checkpoint(folder: Path, model: GPT2, optimizer: Any, run_id: str) -> Progress | None:
    """Restore model and optimiser from the folder's checkpoint and return its progress.

    Returns None, and changes nothing, where there is no checkpoint, or one of another run or shape, or a broken one.
    """
    path = folder / FILE
    state = _state(model, optimizer)
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("run_id") != run_id or set(file.keys()) != set(state):
                return None
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (FileNotFoundError, SafetensorError):
        return None
    if any(arrays[name].shape != tuple(variable.shape) for name, variable in state.items()):
        return None
    for name, variable in state.items():
        variable.assign(arrays[name])
    return Progress(int(metadata["step"]), json.loads(metadata["history"]))
