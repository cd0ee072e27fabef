"""A whole run of the suite: targets take turns on each schedule, repeat by repeat, and a record comes out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.decode import step_bytes
from benchmarks.hardware import BandwidthProbe, environment
from benchmarks.suite.clock import Clock
from benchmarks.suite.driver import play
from benchmarks.suite.events import Response, differing, outputs_hash
from benchmarks.suite.metrics import LATENCIES, Objectives, samples, sorted_quantiles, summarise, throughput
from benchmarks.suite.schedule import Lengths, Planner, Schedule
from benchmarks.suite.statistics import paired, warm_from
from benchmarks.suite.targets.base import Target
from serving.bundle import Geometry
from serving.errors import GPT2BundleError

SCHEMA = "gpt2-bundle-bench/1"
THROUGHPUTS = ("output_tokens_per_second", "input_tokens_per_second", "requests_per_second", "goodput")
HIGHER_IS_BETTER = frozenset(THROUGHPUTS)
# What a winner is named in.
JUDGED = ("p50_ttft_ms", "p50_inter_token_ms", "p99_inter_token_ms", "p50_e2e_ms", "output_tokens_per_second")
_CURVE = 101
_WARM_UP_ROUND, _WARM_UP_MOST = 10, 60
Say = Callable[[str], None]


async def measure(
    targets: list[Target],
    schedules: Sequence[Schedule],
    clock: Clock,
    *,
    missing: dict[str, str] | None = None,
    repeats: int,
    objectives: Objectives,
    geometry: Geometry | None = None,
    timeout: float = 300.0,
    bandwidth: BandwidthProbe | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Start `targets`, warm them up, play each schedule `repeats` times against all in turn, and return the record.

    A target that does not start is taken out of `targets`, with its reason in `missing`, if that is not None.
    The schema is docs/bench-format.md's. `geometry` and `bandwidth` give the floor of a token where both are there.
    """
    entries = []
    try:
        for target in list(targets):
            say(f"{target.name}: loading")
            began = time.monotonic()
            if not await _starts(target, targets, missing):
                continue
            loaded = time.monotonic() - began
            warm = await warm_up(target, schedules[0], clock, timeout)
            entries.append({
                "name": target.name, "label": target.label, "precision": target.precision,
                "stand_in": target.stand_in, "load_seconds": loaded, **warm,
            })  # fmt: skip
        points = []
        for schedule in schedules:
            played: dict[str, list[list[Response]]] = {target.name: [] for target in targets}
            for repeat in range(repeats):
                if bandwidth is not None:
                    bandwidth.sample(passes=3)
                say(f"{schedule.scenario}, {schedule.point}: repeat {repeat + 1} of {repeats}")
                # Who goes first changes, so that nobody always runs behind the same other.
                for place in range(len(targets)):
                    target = targets[(place + repeat) % len(targets)]
                    played[target.name].append(await play(schedule, target, clock, timeout))
            points.append(_point(schedule, targets, played, objectives))
    finally:
        for target in targets:
            await target.stop()
    speed = max(bandwidth.samples) if bandwidth is not None else None
    if speed is not None and geometry is not None:
        _add_floors(points, targets, geometry, speed, {each.sha256: each for each in schedules})
    return {
        "schema": SCHEMA,
        "environment": environment(),
        "settings": {"repeats": repeats, "objectives": asdict(objectives), "timeout": timeout},
        "read_bandwidth_bytes_per_second": speed,
        "targets": entries,
        "not_measured": missing or {},
        "points": points,
    }


async def _starts(target: Target, targets: list[Target], missing: dict[str, str] | None) -> bool:
    """Start a target; False if it does not and need not. Raises GPT2BundleError if it must, or none would be left."""
    try:
        await target.start()
    except GPT2BundleError as error:
        if missing is None or len(targets) == 1:
            raise
        missing[target.name] = str(error)
        targets.remove(target)
        await target.stop()
        return False
    return True


async def warm_up(target: Target, like: Schedule, clock: Clock, timeout: float) -> dict[str, Any]:
    """Send one request at a time, prompts of `like`, until MSER-5 sees a steady end-to-end latency, 60 at most.

    `warm` is False if it never did.
    """
    first = like.requests[0]
    text = [token for request in like.requests for token in request.prompt]
    planner = Planner(text, len(first.prompt) + 8)
    latencies: list[float] = []
    cut = None
    while cut is None and len(latencies) < _WARM_UP_MOST:
        lengths = (
            Lengths(len(first.prompt), len(first.prompt)),
            Lengths(min(8, first.new_tokens), min(8, first.new_tokens)),
        )
        responses = await play(planner.single(_WARM_UP_ROUND, *lengths), target, clock, timeout)
        latencies += [response.finished - response.scheduled for response in responses]
        cut = warm_from(latencies)
    return {"warm_up_requests": len(latencies), "warm_after": cut, "warm": cut is not None}


def figures(responses: Sequence[Response], objectives: Objectives) -> dict[str, float | None]:
    """One repeat's figures by name: mean, p50, p90 and p99 of each latency in ms, and throughputs; None for none."""
    found: dict[str, float | None] = {}
    for latency in LATENCIES:
        values = np.sort(samples(responses, latency)[0]) * 1e3
        numbers = [float(values.mean()), *sorted_quantiles(values)] if len(values) else [None] * 4
        found |= {
            f"{name}_{latency}_ms": number for name, number in zip(("mean", "p50", "p90", "p99"), numbers, strict=True)
        }
    return found | throughput(responses, objectives)


def winner(rows: Mapping[str, Mapping[str, Sequence[float | None]]], figure: str) -> str | None:
    """The target whose repeats of `figure` are better than every other's beyond the noise, or None.

    `rows` is target to its figures, repeat by repeat. One target alone has won nothing.
    """
    series = {name: [value for value in values[figure] if value is not None] for name, values in rows.items()}
    series = {name: values for name, values in series.items() if values and len(values) == len(rows[name][figure])}
    if len(series) < 2:
        return None
    better, pick = ("higher", max) if figure in HIGHER_IS_BETTER else ("lower", min)
    best = pick(series, key=lambda name: float(np.median(series[name])))
    others = [values for name, values in series.items() if name != best]
    return best if all(paired(series[best], values).call == better for values in others) else None


def _point(
    schedule: Schedule, targets: Sequence[Target], played: Mapping[str, list[list[Response]]], objectives: Objectives
) -> dict[str, Any]:
    rows = []
    for target in targets:
        repeats = played[target.name]
        per_repeat = [figures(responses, objectives) for responses in repeats]
        every = [response for responses in repeats for response in responses]
        rows.append({
            "target": target.name,
            "stand_in": target.stand_in,
            "figures": {name: [each[name] for each in per_repeat] for name in per_repeat[0]},
            "summary": summarise(repeats, objectives),
            "curves_ms": {name: _curve(every, name) for name in LATENCIES},
            "all_counted": all(response.counted for response in every),
            "outputs_sha256": outputs_hash(repeats[0]),
            "repeats_differ": any(differing(repeats[0], again) for again in repeats[1:]),
            "differing_requests": {
                other.name: differing(repeats[0], played[other.name][0]) for other in targets if other is not target
            },
            "errors": sorted({response.error for response in every if response.error is not None}),
            "peak_rss_bytes": peak_rss(target.pid()),
            "floor_inter_token_ms": None,
        })  # fmt: skip
    clean: dict[str, Any] = {str(row["target"]): row["figures"] for row in rows if not row["errors"]}
    return {
        "scenario": schedule.scenario,
        "point": schedule.point,
        "settings": schedule.settings,
        "concurrency": schedule.concurrency,
        "schedule_sha256": schedule.sha256,
        "rows": rows,
        "winners": {figure: winner(clean, figure) for figure in JUDGED},
    }


def _curve(responses: Sequence[Response], latency: str) -> list[float] | None:
    """The 0th to 100th percentile in ms, or None for no samples."""
    values = samples(responses, latency)[0]
    return (np.percentile(values, np.linspace(0, 100, _CURVE)) * 1e3).tolist() if len(values) else None


def peak_rss(pid: int | None) -> int | None:
    """The most memory that a process ever held, in bytes (Linux), or None where that is not known."""
    if pid is None:
        return None
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), None)


def _add_floors(
    points: list[dict[str, Any]],
    targets: Sequence[Target],
    geometry: Geometry,
    speed: float,
    schedules: Mapping[str, Schedule],
) -> None:
    """The time to read one row's step once: no token of a single stream can follow another sooner."""
    precisions = {target.name: target.precision for target in targets}
    for point in points:
        requests = schedules[point["schedule_sha256"]].requests
        cached = sum(len(each.prompt) + each.new_tokens / 2 for each in requests) / len(requests)
        for row in point["rows"]:
            precision = precisions[row["target"]]
            if precision is not None:
                row["floor_inter_token_ms"] = step_bytes(geometry, precision, 1, cached) / speed * 1e3
