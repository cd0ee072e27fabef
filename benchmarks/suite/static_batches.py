"""Prefill and decode of static batches: the graph alone, without a scheduler or a client between.

A step of a batch costs little more than a step of one row until arithmetic, and no longer reading, holds it; the rows
here say from which batch on.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common.decode_step import step_bytes
from benchmarks.suite.figures.record_rows import STEPS, blank_row, point_of
from benchmarks.suite.figures.roofline import floor_seconds, prefill_bytes, prompt_flops, token_flops
from benchmarks.suite.load.schedule import Planned, Schedule
from benchmarks.suite.targets.base import Target
from serving.backends.base import Backend
from serving.bundle import Geometry

WARM_UP_STEPS = 8
"""Before the first repeat of a batch size, so that the memory of that batch is there."""
Played = tuple[float, list[float], NDArray[np.int64]]
"""Seconds of the prefill and of each step, and the tokens, [rows, steps + 1]."""


def is_static(target: Target) -> bool:
    """Whether a target runs static batches of a graph in this process, loaded or not."""
    return hasattr(target, "backend")


def backend_of(target: Target) -> Backend | None:
    """The backend that a target runs in this process in static batches, or None where it does not."""
    found: Backend | None = getattr(target, "backend", None)
    return found


def run_batch(backend: Backend, schedule: Schedule, most: int | None = None) -> Played:
    """Read the schedule's prompts as one batch and continue them greedily, `most` steps at most."""
    prompts = [request.prompt for request in schedule.requests]
    count = min(schedule.requests[0].new_tokens, most or schedule.requests[0].new_tokens)
    began = time.perf_counter()
    state, logits = backend.prefill(prompts, len(prompts[0]) + count)
    prefill = time.perf_counter() - began
    steps, tokens = [], [logits.argmax(-1)]
    for _ in range(count):
        began = time.perf_counter()
        logits = backend.decode(state, tokens[-1])
        steps.append(time.perf_counter() - began)
        tokens.append(logits.argmax(-1))
    return prefill, steps, np.stack(tokens, axis=1).astype(np.int64)


def steps_point(
    schedule: Schedule, played: Mapping[str, Sequence[Played]], targets: Sequence[Target]
) -> dict[str, Any]:
    """The point of a batch size, of those targets that were played. A repeat's step is the median of its steps."""
    rows = []
    for target in (each for each in targets if each.name in played):
        repeats = played[target.name]
        medians = [float(np.median(steps)) for _, steps, _ in repeats]
        figures: dict[str, list[float | None]] = {
            "prefill_ms": [prefill * 1e3 for prefill, _, _ in repeats],
            "step_ms": [step * 1e3 for step in medians],
            "step_tokens_per_second": [len(schedule.requests) / step for step in medians],
        }
        others = {name: other for name, other in played.items() if name != target.name}
        rows.append(blank_row(target, figures) | {
            "outputs_sha256": hashlib.sha256(repeats[0][2].astype("<i8").tobytes()).hexdigest(),
            "differing_requests": {name: _differing(repeats, other) for name, other in others.items()},
        })  # fmt: skip
    return point_of(schedule, rows, STEPS)


def add_floors(
    point: dict[str, Any],
    requests: Sequence[Planned],
    precisions: Mapping[str, str | None],
    geometry: Geometry,
    bandwidth: float | None,
    rate: float | None,
) -> None:
    """Put floors and the roofline's points into the rows: those of the whole batch, each weight read once for it."""
    rows, asked, made = len(requests), len(requests[0].prompt), requests[0].new_tokens
    cached = asked + made / 2
    for row in point["rows"]:
        precision = precisions[row["target"]]
        if precision is None:
            continue
        work = {"prefill": rows * prompt_flops(geometry, asked), "decode": rows * token_flops(geometry, cached)}
        read = {
            "prefill": prefill_bytes(geometry, precision, rows, asked),
            "decode": step_bytes(geometry, precision, rows, cached),
        }
        if bandwidth is not None:
            floors = [floor_seconds(work[phase], read[phase], precision, bandwidth, rate) * 1e3 for phase in work]
            row["floor_ttft_ms"], row["floor_inter_token_ms"] = floors
        row["roofline"] = {
            phase: {
                "intensity": work[phase] / read[phase],
                "flops_per_second": work[phase] / float(np.median(row["figures"][figure])) * 1e3,
                "rows": rows,
            }
            for phase, figure in zip(work, STEPS, strict=True)
        }


def _differing(repeats: Sequence[Played], others: Sequence[Played]) -> list[int]:
    pairs = zip((tokens for *_, tokens in repeats), (tokens for *_, tokens in others), strict=True)
    return sorted({int(row) for ours, theirs in pairs for row in np.flatnonzero((ours != theirs).any(axis=1))})
