"""One command on several machines: the chief runs the stages, and the other workers take part in training."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from builder.progress import Reporter
from builder.recipe import Recipe
from builder.stages.run_keys import Run
from builder.stages.train import tokens_digest, train
from builder.training.cluster import check_batch, read_cluster
from builder.training.workers import Workers
from serving import __version__
from serving.errors import InputError

_PACKAGES = ("tensorflow", "keras", "numpy")


@contextlib.contextmanager
def joined_workers(recipe: Recipe, reporter: Reporter) -> Iterator[Workers | None]:
    """Give the workers of TF_CONFIG when all are here; None without it.

    Raises InputError for a TF_CONFIG or a recipe that cannot be, or differs from the chief's, and TrainingError for
    a worker that does not come.
    """
    cluster = read_cluster(os.environ)
    if cluster is None:
        yield None
        return
    check_batch(recipe.training, cluster.size)
    ours = cluster.describe(cluster.rank)
    reporter.line(f"{ours}, {'the chief' if cluster.rank == 0 else 'a worker'}: waiting for all {cluster.size} workers")
    with Workers(cluster, _identity(recipe), recipe.training.worker_timeout) as workers:
        reporter.line(f"all {workers.size} workers are here")
        yield workers


def follow(run: Run, workers: Workers, reporter: Reporter) -> None:
    """Take part in training as a worker that is not the chief; write nothing.

    Raises InputError if the tokens here are not the chief's, and TrainingError when another worker has failed.
    """
    message = workers.receive()
    if "train" not in message:
        reporter.line("the chief has nothing to train")
        return
    wanted = message["train"]
    if tokens_digest(run.prepared) != wanted["tokens"]:
        raise InputError(
            f"{run.prepared}: other tokens than the chief's; share the run's folder with the chief's machine, or copy "
            "this one again"
        )
    workers.agree()
    train(run.recipe, run.prepared, run.trained, wanted["run"], reporter, workers)
    workers.receive()
    reporter.line("training is done; the chief has the weights")


def _identity(recipe: Recipe) -> dict[str, Any]:
    """What must be equal in all workers: the program, its numeric packages, and the recipe but for places of texts."""
    found: dict[str, Any] = {"gpt2-bundle": __version__} | {name: version(name) for name in _PACKAGES}
    for section, value in asdict(recipe).items():
        if isinstance(value, dict):
            found |= {f"{section}.{key}": item for key, item in value.items()}
        else:
            found[section] = value
    # The tokens themselves are compared, and a machine that was given a copy of them needs no texts.
    # The chief alone reports to trackers.
    free = ("corpus.paths", "corpus.transform")
    return {key: item for key, item in found.items() if key not in free and not key.startswith("tracking.")}
