"""The rows of a record: one target at one point, from what its repeats' clients saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.common.statistics import paired
from benchmarks.suite.figures.latency_metrics import (
    LATENCIES,
    Objectives,
    samples,
    sorted_quantiles,
    summarise,
    throughput,
)
from benchmarks.suite.figures.roofline import (
    attained,
    bound_seconds,
    prefill_bytes,
    prompt_flops,
    step_bytes,
    token_flops,
)
from benchmarks.suite.load.events import Response, differing, outputs_hash
from benchmarks.suite.load.schedule import Schedule
from benchmarks.suite.machine.meters import Reading, cost_per_million_tokens
from benchmarks.suite.targets.base import Target
from serving.bundle import Geometry

THROUGHPUTS = ("output_tokens_per_second", "input_tokens_per_second", "requests_per_second", "goodput")
HIGHER_IS_BETTER = frozenset({*THROUGHPUTS, "sustained_requests_per_second", "step_tokens_per_second"})
# In which targets are compared.
COMPARED = ("p50_ttft_ms", "p50_inter_token_ms", "p99_inter_token_ms", "p50_e2e_ms", "output_tokens_per_second")
COLD = ("cold_load_ms", "cold_first_token_ms")
STEPS = ("prefill_ms", "step_ms")
_CURVE = 101
_BARS = 24


@dataclass(frozen=True)
class Repeat:
    """The responses of one play of a schedule against one target, and what the meters read meanwhile."""

    responses: Sequence[Response]
    reading: Reading = field(default_factory=Reading)


class Named(Protocol):
    """What a row says of its target."""

    name: str
    emulator: bool

    @property
    def precision(self) -> str | None: ...


def figures(repeat: Repeat, objectives: Objectives, price_per_hour: float | None = None) -> dict[str, float | None]:
    """Return one repeat's figures by name: mean, p50, p90, p99 of latencies in ms; throughputs, energy and cost."""
    found: dict[str, float | None] = {}
    for latency in LATENCIES:
        values = np.sort(samples(repeat.responses, latency)[0]) * 1e3
        numbers = [float(values.mean()), *sorted_quantiles(values)] if len(values) else [None] * 4
        found |= {
            f"{name}_{latency}_ms": number for name, number in zip(("mean", "p50", "p90", "p99"), numbers, strict=True)
        }
    found |= throughput(repeat.responses, objectives)
    found |= repeat.reading.figures(sum(len(each.token_times) for each in repeat.responses if each.error is None))
    found["cost_per_million_tokens"] = cost_per_million_tokens(price_per_hour, found["output_tokens_per_second"])
    return found


def comparison(rows: Mapping[str, Mapping[str, Sequence[float | None]]], figure: str) -> dict[str, Any] | None:
    """Return the best target of a figure and each other one compared with it; None for fewer than two with the figure.

    `rows` is target to its figures, repeat by repeat. `best` has the best median; `winner` is it if it is better than
    every other beyond the noise, else null; `over_best` maps each other target to the median of its ratios to the best,
    pair by pair, with the 95 % interval, the ratios' noise and what is to be said of them (`statistics.Verdict`).
    """
    series = {name: [value for value in values.get(figure, ()) if value is not None] for name, values in rows.items()}
    series = {name: values for name, values in series.items() if values and len(values) == len(rows[name][figure])}
    if len(series) < 2:
        return None
    worse, pick = ("lower", max) if figure in HIGHER_IS_BETTER else ("higher", min)
    best = pick(series, key=lambda name: float(np.median(series[name])))
    verdicts = {name: paired(values, series[best]) for name, values in series.items() if name != best}
    won = all(verdict.call == worse for verdict in verdicts.values())
    over = {name: asdict(verdict) for name, verdict in verdicts.items()}
    return {"best": best, "winner": best if won else None, "over_best": over}


def make_point(
    schedule: Schedule,
    targets: Sequence[Target],
    played: Mapping[str, Sequence[Repeat]],
    objectives: Objectives,
    price_per_hour: float | None = None,
) -> dict[str, Any]:
    """The point of a schedule, with a row for each target that was played."""
    rows = []
    for target in targets:
        repeats = [repeat.responses for repeat in played[target.name]]
        per_repeat = [figures(repeat, objectives, price_per_hour) for repeat in played[target.name]]
        every = [response for responses in repeats for response in responses]
        others = {other.name: played[other.name] for other in targets if other is not target}
        rows.append(blank_row(target, {name: [each[name] for each in per_repeat] for name in per_repeat[0]}) | {
            "summary": summarise(repeats, objectives),
            "curves_ms": {name: _curve(every, name) for name in LATENCIES},
            "timeline_ms": timeline(repeats[0]),
            "all_counted": all(response.counted for response in every),
            "outputs_sha256": outputs_hash(repeats[0]),
            "differing_requests": {name: _differing(repeats, other) for name, other in others.items()},
            "errors": sorted({response.error for response in every if response.error is not None}),
            "peak_rss_bytes": peak_rss(target.pid()),
        })  # fmt: skip
    return point_of(schedule, rows, COMPARED)


def blank_row(target: Named, values: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    """Return a row with these figures and nothing else."""
    return {
        "target": target.name,
        "precision": target.precision,
        "emulator": target.emulator,
        "figures": dict(values),
        "summary": None,
        "curves_ms": dict.fromkeys(LATENCIES),
        "timeline_ms": [],
        "all_counted": True,
        "outputs_sha256": None,
        "differing_requests": {},
        "errors": [],
        "notes": [],
        "intervals_ms": None,
        "peak_rss_bytes": None,
        "bound_ttft_ms": None,
        "bound_inter_token_ms": None,
        "roofline": None,
    }


def point_of(schedule: Schedule, rows: Sequence[dict[str, Any]], compared: Sequence[str]) -> dict[str, Any]:
    """A point of the record, with the comparisons of the `compared` figures of its rows."""
    found = {figure: comparison(comparable(rows, figure), figure) for figure in compared}
    return {
        "scenario": schedule.scenario,
        "point": schedule.point,
        "settings": schedule.settings,
        "concurrency": schedule.concurrency,
        "schedule_sha256": schedule.sha256,
        "rows": list(rows),
        "winners": {figure: None if each is None else each["winner"] for figure, each in found.items()},
        "comparisons": found,
    }


def comparable(rows: Sequence[Mapping[str, Any]], figure: str) -> dict[str, Any]:
    """Target to figures, of the rows that may be compared in this one: without failed requests, and counted.

    Between tokens of which several came at once there is no time to be better in.
    """
    return {
        str(row["target"]): row["figures"]
        for row in rows
        if not row["errors"] and ("inter_token" not in figure or row["all_counted"])
    }


def timeline(responses: Sequence[Response], most: int = _BARS) -> list[list[float | None]]:
    """Scheduled, sent, started (or None), first token and end of some requests, evenly picked, in ms from the first."""
    if not responses:
        return []
    zero = min(response.scheduled for response in responses)
    picked = sorted({round(place) for place in np.linspace(0, len(responses) - 1, min(most, len(responses)))})
    found: list[list[float | None]] = []
    for each in (responses[place] for place in picked):
        if each.error is None and each.token_times:
            timestamps = (each.scheduled, each.sent, each.started, each.token_times[0], each.finished)
            found.append(
                [None if timestamp is None else round((timestamp - zero) * 1e3, 3) for timestamp in timestamps]
            )
    return found


def add_bounds(
    point: dict[str, Any],
    played: Mapping[str, Sequence[Repeat]],
    geometry: Geometry,
    bandwidth: float | None,
    flops_per_second: float | None,
) -> None:
    """Put the roofline and its bounds into the rows whose precision is known.

    The bounds are those of one prompt, and of one row's step: no token of a single stream can follow another sooner.
    """
    for row in point["rows"]:
        precision, repeats = row["precision"], played.get(row["target"], ())
        if precision is None or not repeats:
            continue
        row["roofline"] = attained(repeats[-1].responses, geometry, precision)
        every = repeats[0].responses
        prompt = sum(each.prompt_tokens for each in every) / len(every)
        cached = prompt + sum(len(each.token_times) / 2 for each in every) / len(every)
        if bandwidth is None:
            continue
        read, work = prefill_bytes(geometry, precision, 1, prompt), prompt_flops(geometry, round(prompt))
        row["bound_ttft_ms"] = bound_seconds(work, read, precision, bandwidth, flops_per_second) * 1e3
        read, work = step_bytes(geometry, precision, 1, cached), token_flops(geometry, cached)
        row["bound_inter_token_ms"] = bound_seconds(work, read, precision, bandwidth, flops_per_second) * 1e3


def peak_rss(pid: int | None) -> int | None:
    """The most memory that a process ever held, in bytes (Linux), or None where that is not known."""
    if pid is None:
        return None
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), None)


def _differing(repeats: Sequence[Sequence[Response]], other: Sequence[Repeat]) -> list[int]:
    pairs = zip(repeats, (repeat.responses for repeat in other), strict=True)
    return sorted({index for ours, theirs in pairs for index in differing(ours, theirs)})


def _curve(responses: Sequence[Response], latency: str) -> list[float] | None:
    """The 0th to 100th percentile in ms, or None for no samples."""
    values = samples(responses, latency)[0]
    return (np.percentile(values, np.linspace(0, 100, _CURVE)) * 1e3).tolist() if len(values) else None
