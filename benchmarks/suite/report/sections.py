"""The sections of a report, as tables that Markdown and HTML share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.suite.figures.latency_metrics import LATENCIES
from benchmarks.suite.report.rankings import needs, rankings
from benchmarks.suite.report.recommendations import differing, recommendations
from benchmarks.suite.report.tables import (
    HEADS,
    Point,
    Row,
    at_sustained,
    batch_of,
    columns,
    groups,
    median_of,
    name_of,
    over_bound,
    remarks,
    shorter,
    sweep_of,
)

_LATENCIES = {
    "ttft": "first token",
    "inter_token": "between tokens",
    "tpot": "per further token",
    "e2e": "end to end",
    "queue": "waiting",
}
_TITLES = {
    "single": "One request at a time",
    "offline": "All at once",
    "server": "Open-loop arrivals",
    "concurrency": "Several clients",
    "cold-start": "Cold starts",
}
_MOST_RANKED = 3


@dataclass(frozen=True)
class Cell:
    """A cell; `best` is better than every other beyond the noise, `wide` holds a text and not a number."""

    text: str
    best: bool = False
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """A heading, a table, and notes below it; `points` are those of the record whose charts belong to it."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()
    points: Sequence[Point] = ()
    scenario: str = ""


def sections(record: Mapping[str, Any]) -> Iterator[Section]:
    """Give the sections of a record in their order, without those that have no rows."""
    for each in (_recommended(record), _ranked(record), _needs(record)):
        if each.rows:
            yield each
    for scenario, points in groups(record):
        yield {"steps": _steps, "saturation": _sweep, "grid": _grid}.get(scenario, _point)(points)
    yield _targets(record)


def details(point: Point) -> Section:
    """Each latency of each target: mean and quantiles with 95 % intervals."""
    rows = []
    for row in point["rows"]:
        for name in LATENCIES:
            if found := row["summary"]["latency"][name] if row["summary"] else None:
                spans = [[found[kind][part] * 1e3 for part in ("value", "low", "high")] for kind in _KINDS]
                told = [f"{shorter(value)} ({shorter(low)} to {shorter(high)})" for value, low, high in spans]
                rows.append(_cells(name_of(row), _LATENCIES[name], *told, f"{found['samples']:,}"))
    notes = ["In ms, over the requests of all repeats, with 95 % bootstrap intervals."]
    return Section("Every latency with its interval", ("target", "latency", *_KINDS, "samples"), rows, notes)


_KINDS = ("mean", "p50", "p90", "p99")


def _recommended(record: Mapping[str, Any]) -> Section:
    every = recommendations(record)
    known = {
        "first token, ms": [each.first_token_ms for each in every],
        "between tokens, ms": [each.between_tokens_ms for each in every],
        "/ bound": [each.over_bound for each in every],
        "tokens/s": [each.tokens_per_second for each in every],
        "peak memory, MiB": [each.memory_bytes and each.memory_bytes / 2**20 for each in every],
        "J/token": [each.joules_per_token for each in every],
    }
    shown = {head: column for head, column in known.items() if any(column)}
    rows = []
    for place, each in enumerate(every):
        taken = Cell(f"{each.targets[0]} or {each.others}" if each.others else each.targets[0], not each.others, True)
        gives = Cell(f"{shorter(each.value)} {each.unit}", wide=True)
        rows.append([Cell(each.use), taken, gives, *(Cell(shorter(column[place], "")) for column in shown.values())])
    outputs = differing(record)
    notes = [
        "Where several targets are named, they are not distinguishable; the figures are those of the first.",
        f"{outputs}." if outputs else "All targets of one precision gave the same outputs.",
    ]
    return Section("Recommendations", ("use", "take", "which gives", *shown), rows, notes)


def _ranked(record: Mapping[str, Any]) -> Section:
    rows = []
    for each in rankings(record):
        best = Cell(each.winner, True, True) if each.winner else Cell(each.call, wide=True)
        order = ", ".join(f"{name} {shorter(value)}" for name, value in each.order[:_MOST_RANKED])
        ratio = noise = ""
        if each.second is not None:
            value, low, high, relative = each.second
            ratio, noise = f"{value:.2f} ({low:.2f} to {high:.2f})", f"{relative:.1%}"
        rows.append([Cell(each.question), best, Cell(order, wide=True), Cell(ratio), Cell(noise)])
    notes = [
        "Second / first is the median of the ratios of paired repeats with its 95 % interval. The noise is the "
        "relative difference, at 95 %, of such medians where nothing differs."
    ]
    return Section("Rankings", ("question", "best", "in order", "second / first", "noise"), rows, notes)


def _needs(record: Mapping[str, Any]) -> Section:
    every = needs(record)
    known = {
        "peak memory, MiB": [each.memory_bytes / 2**20 if each.memory_bytes else None for each in every],
        "cold start to first token, ms": [each.first_token_ms for each in every],
        "between tokens / bound": [each.over_bound for each in every],
        "step of the largest batch / bound": [each.batch_over_bound for each in every],
        "J/token": [each.joules_per_token for each in every],
        "cost of 1M tokens": [each.cost_per_million_tokens for each in every],
    }
    shown = {head: column for head, column in known.items() if any(value is not None for value in column)}
    rows = [
        _cells(each.target, each.precision or "not known", *(shorter(column[place]) for column in shown.values()))
        for place, each in enumerate(every)
    ]
    notes = [
        "Memory is the peak of a process that does nothing else; for a target in this process, of a fresh one. The "
        "roofline bound is the least time for reading weights and KV cache, or for the arithmetic, on this machine."
    ]
    return Section("What each target needs", ("target", "weights", *shown), rows if shown else [], notes)


def _point(points: Sequence[Point]) -> Section:
    point = points[0]
    scenario, shown = str(point["scenario"]), columns(point)
    bounds = "p50_inter_token_ms" in shown
    # A target in this process has no memory of its own.
    known = [row["peak_rss_bytes"] is not None for row in point["rows"]]
    memory = all(known) or (scenario == "cold-start" and any(known))
    heads = [HEADS[each] for each in shown] + ["bound, ms", "/ bound"] * bounds + ["peak memory, MiB"] * memory
    rows = []
    for row in point["rows"]:
        cells = [_figure(point, row, figure) for figure in shown]
        if bounds:
            cells += _cells(shorter(row["bound_inter_token_ms"]), shorter(over_bound(row, "p50_inter_token_ms")))
        cells += [Cell(shorter((row["peak_rss_bytes"] or 0) / 2**20 or None))] * memory
        rows.append([Cell(name_of(row)), *cells])
    notes = ["From the start of a process, its files in the page cache."] if scenario == "cold-start" else []
    title = _TITLES.get(scenario, scenario) + ("" if scenario in ("single", "cold-start") else f": {point['point']}")
    return Section(title, ("target", *heads), rows, [*notes, *remarks(points)], points, scenario)


def _steps(points: Sequence[Point]) -> Section:
    shown = columns(points[0])
    rows = []
    for point in points:
        for row in point["rows"]:
            cells = [Cell(batch_of(point)), *(_figure(point, row, figure) for figure in shown)]
            cells += _cells(shorter(row["bound_inter_token_ms"]), shorter(over_bound(row, "step_ms")))
            rows.append([Cell(name_of(row)), *cells])
    notes = [
        f"Prompts of {points[0]['settings']['prompt']['high']} tokens. A step is one token for every row, until the "
        "logits are in the caller's hands: no scheduler, no client.",
        *remarks(points),
    ]
    heads = ("target", "batch", *(HEADS[each] for each in shown), "bound of a step, ms", "step / bound")
    return Section("Static batches", heads, rows, notes, points, "steps")


def _sweep(points: Sequence[Point]) -> Section:
    result = sweep_of(points)
    rows = []
    for row in result["rows"] if result is not None else ():
        there = at_sustained(points, row)
        known = [median_of(there, each) if there else None for each in ("p50_e2e_ms", "p99_e2e_ms", "p99_ttft_ms")]
        cells = [_figure(result or {}, row, "sustained_requests_per_second"), Cell(shorter(row["sweep"]["failed_at"]))]
        cells += [Cell(row["sweep"]["why"] or "not seen to fail", wide=True), *_cells(*map(shorter, known))]
        rows.append([Cell(name_of(row)), *cells])
    heads = (
        "target",
        "sustains, requests/s",
        "fails at",
        "why",
        "end to end p50, ms",
        "p99, ms",
        "first token p99, ms",
    )
    notes = [
        "The same schedules for all, each rate played once. A target keeps up while answers come at 95 % of the rate "
        "or more and as many meet the objectives. Latencies are those at the sustained rate. Neighbouring rates are "
        "not distinguishable: a target is best only where every other failed below its rate.",
        *remarks(points),
    ]
    return Section("Highest rate sustained", heads, rows, notes, points, "saturation")


def _grid(points: Sequence[Point]) -> Section:
    names = list(dict.fromkeys(name_of(row) for point in points for row in point["rows"]))
    rows = [[Cell(point["point"]), *(_figure(point, row, "p50_e2e_ms") for row in point["rows"])] for point in points]
    notes = ["End to end p50 in ms.", *remarks(points)]
    return Section("Prompt and output lengths", ("tokens in, out", *names), rows, notes, points, "grid")


def _targets(record: Mapping[str, Any]) -> Section:
    rows = []
    for target in record["targets"]:
        label = target["label"] + (" (emulator)" if target["emulator"] else "")
        warm = f"{target['warm_after']} requests" if target["warm"] else "never steady"
        told = _cells(target["precision"] or "not known", shorter(target["load_seconds"]), warm)
        rows.append([Cell(str(target["name"])), Cell(label, wide=True), *told])
    notes = [f"{name} was not measured: {why}" for name, why in record.get("not_measured", {}).items()]
    if record["read_bandwidth_bytes_per_second"]:
        rate = record["fp32_flops_per_second"]
        notes.append(
            f"The roofline bound is at {record['read_bandwidth_bytes_per_second'] / 1e9:.1f} GB/s"
            + (f" and {rate / 1e9:.0f} GFLOP/s (float32)" if rate else "")
            + ", the best measured between the repeats. It bounds nothing where the weights fit the last-level cache."
        )
    return Section("Targets", ("target", "what it is", "weights", "load, s", "warm after"), rows, notes)


def _cells(*texts: str) -> list[Cell]:
    return [Cell(text) for text in texts]


def _figure(point: Point, row: Row, figure: str) -> Cell:
    value = median_of(row, figure)
    if value is not None and figure.endswith("_bytes"):
        value /= 2**20
    return Cell(shorter(value), point["winners"].get(figure) == row["target"])
