"""Run by test_devices in a process of its own: the processor as two devices, which must be said before any other use.

Trains a recipe on one of them, on both, and on both with a stop on the way; prints the greatest differences.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from builder.keras_backend import keras, tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)

from builder.model.gpt2 import named_variables  # noqa: E402
from builder.recipe import TrainingRecipe  # noqa: E402
from builder.training.device_strategy import training_devices  # noqa: E402
from builder.training.trainer import LanguageModel, fit  # noqa: E402
from tests.builder.training.test_training_control import ADAM, GEOMETRY, TRAIN, VALIDATION, Stop  # noqa: E402


def run(folder: Path, recipe: TrainingRecipe, stop_at: int = 0) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    def notify(event: dict[str, Any]) -> None:
        if event["step"] == stop_at and "validation" not in event:
            raise Stop

    with training_devices(recipe) as devices:
        keras.utils.set_random_seed(7)
        model = LanguageModel.create(GEOMETRY)
        history = fit(model, recipe, TRAIN, VALIDATION, seed=1, folder=folder, run_id="run", notify=notify)
    weights = {name: np.array(variable) for name, variable in named_variables(model)}
    for name, weight in weights.items():
        if name.endswith("c_attn.bias"):
            weight[16:32] = 0  # The keys' part, whose gradient is rounding (see test_training_control).
    return weights, history, devices


def farthest(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    return max(float(np.abs(weight - theirs[name]).max()) for name, weight in ours.items())


def main(folder: Path, changes: dict[str, Any]) -> None:
    recipe = replace(ADAM, max_grad_norm=0.1, **changes)
    one, history, single = run(folder / "one", replace(recipe, devices=1))
    both, of_both, devices = run(folder / "both", recipe)
    try:
        run(folder / "parts", recipe, stop_at=17)
    except Stop:
        resumed, _, _ = run(folder / "parts", recipe)
    start = LanguageModel.create(GEOMETRY)
    moved = farthest(one, {name: np.array(variable) for name, variable in named_variables(start)})
    figures = {
        "devices": [single, devices],
        "moved": moved,
        "apart": farthest(one, both),
        "resumed": farthest(both, resumed),
        "losses": [[row["validation_loss"] for row in rows] for rows in (history, of_both)],
        "accuracies": [[row["validation_accuracy"] for row in rows] for rows in (history, of_both)],
        "train_losses": [[row["train_loss"] for row in rows] for rows in (history, of_both)],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
