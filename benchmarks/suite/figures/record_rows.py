"""The rows of a record: one target at one point, from what its repeats' clients saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from benchmarks.common.hardware import process_memory
from benchmarks.common.statistics import paired
from benchmarks.suite.figures.latency_metrics import (
    KINDS,
    LATENCIES,
    Objectives,
    mean_and_quantiles,
    samples,
    summarise,
    throughput,
)
from benchmarks.suite.figures.roofline import bound_seconds, prefill_bytes, prompt_flops, step_bytes, token_flops
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
        numbers: list[Any] = mean_and_quantiles(values) if len(values) else [None] * 4
        found |= {f"{kind}_{latency}_ms": number for kind, number in zip(KINDS, numbers, strict=True)}
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
    responses = {name: [repeat.responses for repeat in repeats] for name, repeats in played.items()}
    rows = []
    for target in targets:
        repeats = responses[target.name]
        per_repeat = [figures(repeat, objectives, price_per_hour) for repeat in played[target.name]]
        every = [response for repeat in repeats for response in repeat]
        others = {name: other for name, other in responses.items() if name != target.name}
        rows.append(blank_row(target, {name: [each[name] for each in per_repeat] for name in per_repeat[0]}) | {
            "summary": summarise(repeats, objectives),
            "curves_ms": {name: _curve(every, name) for name in LATENCIES},
            "all_counted": all(response.counted for response in every),
            "outputs_sha256": outputs_hash(repeats[0]),
            "differing_requests": {name: _differing(repeats, other) for name, other in others.items()},
            "errors": sorted({response.error for response in every if response.error is not None}),
            "peak_rss_bytes": peak_rss(target.pid()),
        })  # fmt: skip
    return point_of(schedule, rows, COMPARED)


def blank_row(target: Named, values: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    """Return a row with these figures and nothing else."""
    about = {"target": target.name, "precision": target.precision, "emulator": target.emulator}
    nothing = ("summary", "outputs_sha256", "intervals_ms", "peak_rss_bytes", "bound_ttft_ms", "bound_inter_token_ms")
    row: dict[str, Any] = about | {"figures": dict(values), "curves_ms": dict.fromkeys(LATENCIES), "roofline": None}
    return row | dict.fromkeys(nothing) | {"all_counted": True, "differing_requests": {}, "errors": [], "notes": []}


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


def add_bounds(
    point: dict[str, Any],
    schedule: Schedule,
    geometry: Geometry,
    bandwidth: float | None,
    rate: float | Mapping[str, float] | None,
    caches: Mapping[str, str] | None = None,
) -> None:
    """Put the roofline bounds into the rows whose precision is known; without a bandwidth there are none.

    Those of steps are of the whole batch, each weight read once for it, with what the batch attained. Others are those
    of one prompt, and of one row's step: no token of a single stream can follow another sooner. `caches` are the
    precisions of KV caches by target, where they do not follow from the weights'. See `bound_seconds` for `rate`.
    """
    requests, is_batch = schedule.requests, point["scenario"] == "steps"
    if not requests or point["scenario"] == "cold-start":
        return
    rows = len(requests) if is_batch else 1
    prompt = sum(len(each.prompt) for each in requests) / len(requests)
    cached = prompt + sum(each.new_tokens for each in requests) / 2 / len(requests)
    work = {"prefill": rows * prompt_flops(geometry, prompt), "decode": rows * token_flops(geometry, cached)}
    for row in point["rows"]:
        precision = row["precision"]
        if precision is None or (is_batch and row["errors"]):
            continue
        cache = (caches or {}).get(row["target"], "")
        read = {
            "prefill": prefill_bytes(geometry, precision, rows, prompt),
            "decode": step_bytes(geometry, precision, rows, cached, cache),
        }
        if bandwidth is not None:
            seconds = [bound_seconds(work[each], read[each], precision, bandwidth, rate) for each in work]
            row["bound_ttft_ms"], row["bound_inter_token_ms"] = (each * 1e3 for each in seconds)
        if is_batch:
            row["roofline"] = {
                phase: _attained(work[phase], read[phase], rows, row["figures"][figure])
                for phase, figure in zip(work, STEPS, strict=True)
            }


def _attained(work: float, read: float, rows: int, milliseconds: Sequence[float | None]) -> dict[str, Any] | None:
    known = [value for value in milliseconds if value]
    if not known:
        return None
    return {"intensity": work / read, "flops_per_second": work / float(np.median(known)) * 1e3, "rows": rows}


def peak_rss(pid: int | None) -> int | None:
    """The most memory that a process ever held, in bytes (Linux), or None where that is not known."""
    return None if pid is None else process_memory(pid).get("VmHWM")


def _differing(repeats: Sequence[Sequence[Response]], others: Sequence[Sequence[Response]]) -> list[int]:
    pairs = zip(repeats, others, strict=True)
    return sorted({index for ours, theirs in pairs for index in differing(ours, theirs)})


def _curve(responses: Sequence[Response], latency: str) -> list[float] | None:
    """The 0th to 100th percentile in ms, or None for no samples."""
    values = samples(responses, latency)[0]
    return (np.percentile(values, np.linspace(0, 100, _CURVE)) * 1e3).tolist() if len(values) else None
