"""Findings of lint on what is configured next to a SavedModel, and on what the SavedModel must not hold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from builder.tf_export.lint_graph import PYTHON, Finding, reached_functions
from serving.deploy.tf_serving_config import BATCHING, BATCHING_RISKS, PADDING_RISK
from serving.protobuf.saved_model_ops import FOREIGN_OPS, Problem

_MOST_BYTES = 1 << 20
_SHOWN = 8
_PADS = re.compile(r"^\s*pad_variable_length_inputs\s*:\s*true\b", re.MULTILINE)
_BATCHES = re.compile(r"--enable_(?:per_model_)?batching(?!_)(?:_parameters)?(?:=(?:true|1)\b|\s|\"|$)", re.MULTILINE)


def batching_files(version: Path) -> list[Path]:
    """The batching parameters next to the SavedModel in `version`: of a bundle, of a deployment, or of its own."""
    places = [version / "batching_params.pbtxt"]
    for above in (version.parent.parent, version.parent.parent.parent):
        places += [above / "deploy" / "tf_serving" / BATCHING, above / "config" / BATCHING]
    return [path for path in places if path.is_file()]


def read_text(path: Path) -> str:
    """The text of a configuration file, without its comments."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return re.sub(r"#[^\n]*", "", file.read(_MOST_BYTES))


def check_configuration(version: Path) -> Iterator[Finding]:
    """Warn of what the files next to the SavedModel have the server do, whatever the model is."""
    started = [above / name for above in (version.parent.parent, version.parent.parent.parent)
               for name in ("run.sh", "compose.yaml")]  # fmt: skip
    found = batching_files(version)
    on = found or [path for path in started if path.is_file() and _BATCHES.search(read_text(path))]
    if on:
        risks = "; ".join(BATCHING_RISKS)
        yield Finding(
            "warning", "batching", on[0].name, f"the server merges requests: {risks}; deploy without batching"
        )
    for path in found:
        if _PADS.search(read_text(path)):
            yield Finding("warning", "batching", path.name, f"{PADDING_RISK}; take it out")


def check_own_contents(problems: Sequence[Problem]) -> list[Finding]:
    """What no export of this project holds, as errors: the bundle's readers refuse it, so nothing more is looked at."""
    messages: dict[tuple[str, str], str] = {}
    for problem in problems:
        messages.setdefault((problem.where, problem.op or problem.message), problem.message)
    return [Finding("error", "contents", where, message) for (where, _), message in messages.items()]


def check_contents(meta_graph: Any, problems: Sequence[Problem]) -> Iterator[Finding]:
    """In a SavedModel of anyone: errors for ops that open files or run foreign code where a session reaches them.

    For what else no export of this project holds, a note says that the model is not run here.
    """
    reached = {"graph", *reached_functions(meta_graph)}
    for where, op in dict.fromkeys((problem.where, problem.op) for problem in problems):
        if FOREIGN_OPS.fullmatch(op) and op not in PYTHON and where in reached:
            message = f"{op} opens files or runs code that is not in the graph, as the server's user"
            yield Finding("error", "contents", where, message)
    if problems:
        held = list(dict.fromkeys(problem.op for problem in problems if problem.op))
        names = ", ".join(repr(op[:80]) for op in held[:_SHOWN]) or problems[0].message
        more = f" and {len(held) - _SHOWN} more" if len(held) > _SHOWN else ""
        message = f"not run here: it holds {names}{more}, which the exports of this project do not"
        yield Finding("note", "contents", "model", message)
