"""Prefill and decode of static batches: the graph alone, without a scheduler or a client.

A step of a batch costs little more than a step of one row until arithmetic, and not reading, bounds it; the rows of
this scenario show from which batch size on.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.common.static_batch import BatchRun, BatchRunner
from benchmarks.common.statistics import summarise
from benchmarks.suite.figures.record_rows import STEPS, Named, blank_row, point_of
from benchmarks.suite.figures.roofline import bound_seconds, prefill_bytes, prompt_flops, step_bytes, token_flops
from benchmarks.suite.load.schedule import Schedule
from benchmarks.suite.machine.contention import Machine
from serving.bundle import Geometry
from serving.errors import GPT2BundleError

# A runtime's threads spin for a while after its last call, and would take the cores from the next one.
_PAUSE = 0.3


def is_static(target: object) -> bool:
    """Return whether a target runs static batches of a graph in this process, loaded or not."""
    return hasattr(target, "runner")


def runner_of(target: object) -> BatchRunner | None:
    """Return what runs a target's static batches, or None if the target has nothing of the kind."""
    found: BatchRunner | None = getattr(target, "runner", None)
    return found


def play_batches(
    runners: Mapping[str, BatchRunner],
    schedule: Schedule,
    repeats: int,
    *,
    warm_up_steps: int = 8,
    machine: Machine | None = None,
    say: Callable[[str], None] = lambda line: None,
    failed: dict[str, str] | None = None,
) -> dict[str, list[BatchRun]]:
    """Run the schedule's prompts as one batch, `repeats` times by each runner in turns.

    Before, each runner takes `warm_up_steps`, so that the memory of that batch is allocated. The rates of `machine` are
    sampled before each round, and its meters read each run. A runner that fails is left out and named in `failed`;
    without `failed` its GPT2BundleError is raised.
    """
    prompts = [request.prompt for request in schedule.requests]
    steps, machine = schedule.requests[0].new_tokens, machine or Machine()
    meters = machine.meters
    played: dict[str, list[BatchRun]] = {name: [] for name in runners}

    def once(name: str, new_tokens: int) -> None:
        time.sleep(_PAUSE)
        try:
            with meters.window() as window:
                run = runners[name].run(prompts, new_tokens)
            # The prefill makes a token too.
            run.metered = window.reading.figures(len(prompts) * (new_tokens + 1))
            played[name].append(run)
        except GPT2BundleError as error:
            if failed is None:
                raise
            say(f"{name} is left out: {error}")
            failed[name] = str(error)
            del played[name]

    for name in list(played):
        say(f"{schedule.point}: {name} warms up")
        once(name, min(steps, warm_up_steps))
    for runs in played.values():
        runs.clear()
    for repeat in range(repeats):
        machine.sample()
        names = list(played)
        say(f"{schedule.point}: repeat {repeat + 1} of {repeats}: {', '.join(names)}")
        # The order rotates, so that no runtime always runs after the same other one.
        for place in range(len(names)):
            once(names[(place + repeat) % len(names)], steps)
    return {name: runs for name, runs in played.items() if runs}


def steps_point(
    schedule: Schedule, played: Mapping[str, Sequence[BatchRun]], targets: Sequence[Named]
) -> dict[str, Any]:
    """Return the point of a batch size, with those targets that were played.

    A repeat's step is the median of its steps; `intervals_ms` are 95 % bootstrap intervals over all prefills and steps.
    """
    rows = []
    for target in (each for each in targets if each.name in played):
        runs = played[target.name]
        medians = [float(np.median(run.steps)) if run.steps else None for run in runs]
        figures: dict[str, list[float | None]] = {
            "prefill_ms": [run.prefill * 1e3 for run in runs],
            "step_ms": [None if step is None else step * 1e3 for step in medians],
            "step_tokens_per_second": [len(schedule.requests) / step if step else None for step in medians],
        }
        # Without any meter all are null in all runs.
        for name in runs[0].metered:
            if any(run.metered[name] is not None for run in runs):
                figures[name] = [run.metered[name] for run in runs]
        samples = {
            "prefill_ms": [run.prefill * 1e3 for run in runs],
            "step_ms": [step * 1e3 for run in runs for step in run.steps],
        }
        tokens = {name: [_by_row(run) for run in other] for name, other in played.items()}
        own = tokens.pop(target.name)
        rows.append(blank_row(target, figures) | {
            "intervals_ms": {name: _interval(values) for name, values in samples.items()},
            "outputs_sha256": hashlib.sha256(own[0].astype("<i8").tobytes()).hexdigest(),
            "differing_requests": {name: _differing(own, other) for name, other in tokens.items()},
            "notes": ["the outputs of its repeats differ"] if _differing(own, own[:1] * len(own)) else [],
        })  # fmt: skip
    return point_of(schedule, rows, STEPS)


def add_bounds(
    point: dict[str, Any],
    schedule: Schedule,
    geometry: Geometry,
    bandwidth: float | None,
    flops_per_second: float | Mapping[str, float] | None,
    caches: Mapping[str, str] | None = None,
) -> None:
    """Put the roofline bounds into the rows: those of the whole batch, each weight read once for it.

    `caches` are the precisions of KV caches by target, where they do not follow from the weights'. The rates
    are those of `bound_seconds`; without a bandwidth there are no bounds.
    """
    requests = schedule.requests
    rows, prompt, new_tokens = len(requests), len(requests[0].prompt), requests[0].new_tokens
    cached = prompt + new_tokens / 2
    for row in point["rows"]:
        precision = row["precision"]
        if precision is None or row["errors"]:
            continue
        work = {"prefill": rows * prompt_flops(geometry, prompt), "decode": rows * token_flops(geometry, cached)}
        read = {
            "prefill": prefill_bytes(geometry, precision, rows, prompt),
            "decode": step_bytes(geometry, precision, rows, cached, (caches or {}).get(row["target"], "")),
        }
        if bandwidth is not None:
            seconds = [bound_seconds(work[each], read[each], precision, bandwidth, flops_per_second) for each in work]
            row["bound_ttft_ms"], row["bound_inter_token_ms"] = (each * 1e3 for each in seconds)
        row["roofline"] = {
            phase: _attained(work[phase], read[phase], rows, row["figures"][figure])
            for phase, figure in zip(work, STEPS, strict=True)
        }


def _attained(work: float, read: float, rows: int, milliseconds: Sequence[float | None]) -> dict[str, Any] | None:
    known = [value for value in milliseconds if value]
    if not known:
        return None
    return {"intensity": work / read, "flops_per_second": work / float(np.median(known)) * 1e3, "rows": rows}


def _interval(values: Sequence[float]) -> list[float] | None:
    found = summarise(values)
    return None if found is None else [found.low, found.high]


def _by_row(run: BatchRun) -> Any:
    """The tokens as [rows, steps + 1]."""
    return np.array(run.tokens, np.int64).T


def _differing(repeats: Sequence[Any], others: Sequence[Any]) -> list[int]:
    found: set[int] = set()
    # A runtime that failed later has fewer repeats.
    for ours, theirs in zip(repeats, others, strict=False):
        width = min(ours.shape[1], theirs.shape[1])
        found |= {int(row) for row in np.flatnonzero((ours[:, :width] != theirs[:, :width]).any(axis=1))}
    return sorted(found)
