"""Lint: whether stock TensorFlow Serving can load, merge, answer in time and hold a SavedModel, anyone's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.keras_backend import tf
from builder.tf_export.lint_config import check_configuration, check_contents, check_own_contents
from builder.tf_export.lint_costs import check_memory, check_time, largest_batch, measure, memory
from builder.tf_export.lint_graph import Finding, check_ops, check_signatures
from serving.bundle import MANIFEST_NAME, Geometry, open_bundle
from serving.deploy.tf_serving import MARKER, read_deployment
from serving.deploy.versions import versions_in
from serving.errors import BundleError, InputError
from serving.protobuf.saved_model_ops import find_problems

_ORDER = ("error", "warning", "note")


@dataclass(frozen=True)
class Target:
    """A SavedModel's version folder, and the geometry of its model where a bundle says it: one of this project's."""

    version: Path
    geometry: Geometry | None = None


def find_target(folder: Path) -> Target:
    """The SavedModel of a bundle, of a deployment or a TensorFlow Serving model folder (the newest version), or
    `folder` itself.

    Raises InputError if there is none, and BundleError for a damaged bundle or deployment.
    """
    if (folder / MANIFEST_NAME).is_file():
        return Target(folder / "savedmodel" / "1", open_bundle(folder, check="sizes").manifest.model)
    if (folder / MARKER).is_file():
        deployment = read_deployment(folder)
        return Target(_newest(folder / deployment.model), deployment.geometry)
    return Target(folder if (folder / "saved_model.pb").is_file() else _newest(folder))


def _newest(model: Path) -> Path:
    versions = [model / str(version) for version in versions_in(model)]
    there = [version for version in versions if (version / "saved_model.pb").is_file()]
    if not there:
        raise InputError(
            f"{model}: no SavedModel here (saved_model.pb, or numbered folders with one), no bundle and no deployment"
        )
    return there[-1]


def lint(
    target: Target,
    *,
    ms_per_token: float | None = None,
    run: bool = False,
    context: int | None = None,
    timeout: float = 30.0,
    budget: int | None = None,
    batch: int | None = None,
) -> list[Finding]:
    """All findings on one SavedModel, errors first.

    The time of a token is `ms_per_token`, or measured here with `run`; the longest generation has `context` tokens, by
    default the model's. `timeout` is the server's for REST in seconds, `budget` a GPU's memory in bytes, `batch` the
    rows of the largest batch, by default those that the batching parameters next to the SavedModel allow. Raises
    BundleError for a file that is not a SavedModel for serving.
    """
    problems = [*find_problems(target.version)]
    if target.geometry is not None and problems:
        return check_own_contents(problems)
    meta_graph = read_meta_graph(target.version)
    findings = [
        *check_ops(meta_graph),
        *check_contents(meta_graph, problems),
        *check_signatures(meta_graph),
        *check_configuration(target.version),
    ]
    context = context or (target.geometry.n_positions if target.geometry else None)
    broken = any(finding.level == "error" for finding in findings)
    if run and ms_per_token is None and not broken and not problems:
        ms_per_token = measure(target.version)
    if ms_per_token is not None and context is not None:
        findings.append(check_time(ms_per_token, context, timeout))
    else:
        why = "--ms-per-token and --context, or a bundle without errors, are needed"
        findings.append(Finding("note", "timeout", "model", f"not compared with the REST timeout: {why}"))
    rows = batch or largest_batch(target.version)
    findings += check_memory(memory(target.version, target.geometry, rows), rows, budget)
    return sorted(findings, key=lambda finding: _ORDER.index(finding.level))


def refuse_errors(folder: Path, findings: Sequence[Finding]) -> None:
    """Raise BundleError with the first error, if there is any."""
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise BundleError(f"{folder}: {errors[0].where}: {errors[0].message}{more}")


def read_meta_graph(version: Path) -> Any:
    """The graph tagged for serving. Raises BundleError if the file is not a SavedModel or has no such graph."""
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    path = version / "saved_model.pb"
    saved = SavedModel()
    try:
        saved.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise BundleError(f"{path}: not a SavedModel ({error}); export it again") from None
    for meta_graph in saved.meta_graphs:
        if tf.saved_model.SERVING in meta_graph.meta_info_def.tags:
            return meta_graph
    raise BundleError(f"{path}: no graph with the tag {tf.saved_model.SERVING!r}, the one that the server loads")
