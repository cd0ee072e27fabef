"""Run by test_worker_processes as each of two workers: several recipes by two, and in the chief by one as well.

The chief prints, for each recipe that is named, how far two workers end from one with the same batches, and how far
one moved.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from builder.keras_backend import keras
from builder.model.gpt2 import named_variables
from builder.recipe import TrainingRecipe
from builder.training.cluster import Cluster
from builder.training.metrics_log import MetricsLog, read_metrics
from builder.training.trainer import LanguageModel, fit
from builder.training.workers import Workers
from tests.builder.data.test_document_batches import TRAIN as DOCUMENTS
from tests.builder.data.test_document_batches import VALIDATION as HELD_OUT
from tests.builder.training.test_training_control import ADAM, GEOMETRY, TRAIN, VALIDATION

RECIPES: dict[str, tuple[TrainingRecipe, Any, Any]] = {
    "fit": (ADAM, TRAIN, VALIDATION),
    "custom": (replace(ADAM, loop="custom", epochs=0.6), TRAIN, VALIDATION),
    "XLA": (replace(ADAM, jit_compile=True, epochs=0.6, validations=2), TRAIN, VALIDATION),
    "muon": (replace(ADAM, optimizer="muon", max_grad_norm=0.1), TRAIN, VALIDATION),
    "accumulation": (replace(ADAM, accumulation=2, batch_size=8), TRAIN, VALIDATION),
    "masked": (replace(ADAM, label_smoothing=0.1), DOCUMENTS, HELD_OUT),
    "rows": (replace(ADAM, packing="rows", accumulation=2, ema=0.9), DOCUMENTS, HELD_OUT),
    "best": (replace(ADAM, keep="best", patience=1, learning_rate=0.05), TRAIN, VALIDATION),
}


def weights_of(model: LanguageModel) -> dict[str, Any]:
    weights = {name: np.array(np.asarray(variable)) for name, variable in named_variables(model)}
    for name, weight in weights.items():
        if name.endswith("c_attn.bias"):
            weight[16:32] = 0  # The keys' part, whose gradient is rounding (see test_training_control).
    return weights


def run(folder: Path, recipe: TrainingRecipe, data: tuple[Any, Any], workers: Workers | None) -> Any:
    # Another seed in each worker: what the chief has is what all begin with.
    keras.utils.set_random_seed(7 + (workers.rank if workers else 0))
    model = LanguageModel.create(GEOMETRY)
    start = weights_of(model)
    losses: list[float] = []

    def notify(event: dict[str, Any]) -> None:
        if "validation" not in event:
            losses.append(event["loss"])

    log = MetricsLog(folder, every=3) if workers is None or workers.is_chief else None
    history = fit(
        model, recipe, *data, seed=1, folder=folder, run_id="run", notify=notify, log=log, workers=workers
    )  # fmt: skip
    return start, weights_of(model), history, losses


def farthest(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    return max(float(np.abs(weight - theirs[name]).max()) for name, weight in ours.items())


def apart(ours: Any, theirs: Any) -> float:
    """The greatest relative difference of two lists of figures."""
    assert len(ours) == len(theirs), (len(ours), len(theirs))
    return float(np.max(np.abs(np.array(ours) / np.array(theirs) - 1)))


def main(folder: Path, rank: int, ports: list[int], names: list[str]) -> None:
    cluster = Cluster(("worker 0", "worker 1"), tuple(("127.0.0.1", port) for port in ports), rank)
    for name in names:
        recipe, *data = RECIPES[name]
        place = folder / f"{name}-{rank}"
        with Workers(cluster, {"recipe": name}, timeout=120) as workers:
            if workers.is_chief:
                workers.start_training({})
            else:
                workers.receive()
                workers.agree()
            _, both, history, losses = run(place, recipe, (data[0], data[1]), workers)
            if not workers.is_chief:
                workers.receive()
        if rank:
            assert not place.exists(), "a worker that is not the chief wrote"
            continue
        start, one, of_one, losses_of_one = run(folder / f"{name}-one", recipe, (data[0], data[1]), None)
        rows = list(zip(of_one, history, strict=True))
        keys = ("train_loss", "validation_loss")
        logs = [read_metrics(folder / f"{name}-{which}") for which in (0, "one")]
        found = {
            "steps": len(losses),
            "losses": apart(losses, losses_of_one),
            "figures": max(apart([row[1][key] for row in rows], [row[0][key] for row in rows]) for key in keys),
            "logged": max(
                apart(*([line[key] for line in log if key in line] for log in logs))
                for key in ("loss", "gradient_norm")
            ),
            "weights": farthest(one, both),
            "moved": farthest(one, start),
        }
        print(json.dumps({name: found}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), [int(port) for port in sys.argv[3].split(",")], sys.argv[4:])
