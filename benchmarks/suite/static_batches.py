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
from benchmarks.suite.load.schedule import Schedule
from benchmarks.suite.machine.contention import Machine
from serving.errors import GPT2BundleError

# A runtime's threads spin for a while after its last call, and would take the cores from the next one.
_PAUSE = 0.3


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
    outputs = {name: [np.array(run.tokens, np.int64).T for run in runs] for name, runs in played.items()}
    rows = []
    for target in (each for each in targets if each.name in played):
        runs, own = played[target.name], outputs[target.name]
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
        steps = [step * 1e3 for run in runs for step in run.steps]
        prefills = [run.prefill * 1e3 for run in runs]
        rows.append(blank_row(target, figures) | {
            "intervals_ms": {"prefill_ms": _interval(prefills), "step_ms": _interval(steps)},
            "outputs_sha256": hashlib.sha256(own[0].astype("<i8").tobytes()).hexdigest(),
            "differing_requests": {
                name: _differing(own, other) for name, other in outputs.items() if name != target.name
            },
            "notes": ["the outputs of its repeats differ"] if _differing(own, own[:1] * len(own)) else [],
        })  # fmt: skip
    return point_of(schedule, rows, STEPS)


def _interval(values: Sequence[float]) -> list[float] | None:
    found = summarise(values)
    return None if found is None else [found.low, found.high]


def _differing(repeats: Sequence[Any], others: Sequence[Any]) -> list[int]:
    """The rows of outputs, [rows, steps + 1] for each repeat, that differ in one."""
    found: set[int] = set()
    # A runtime that failed later has fewer repeats.
    for ours, theirs in zip(repeats, others, strict=False):
        width = min(ours.shape[1], theirs.shape[1])
        found |= {int(row) for row in np.flatnonzero((ours[:, :width] != theirs[:, :width]).any(axis=1))}
    return sorted(found)
