"""The sections of a report, as tables that Markdown and HTML share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.suite.figures.latency_metrics import KINDS, LATENCIES
from benchmarks.suite.report.rankings import Known, differing, needs, rankings, recommendations
from benchmarks.suite.report.tables import (
    HEADS,
    Point,
    Row,
    at_sustained,
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
        yield {"steps": _steps, "saturation": _sweep}.get(scenario, _point)(points)
    yield _targets(record)


def details(point: Point) -> Section:
    """Each latency of each target: mean and quantiles with 95 % intervals."""
    rows = []
    for row in point["rows"]:
        for name in LATENCIES:
            if found := row["summary"]["latency"][name] if row["summary"] else None:
                spans = [[found[kind][part] * 1e3 for part in ("value", "low", "high")] for kind in KINDS]
                told = [f"{shorter(value)} ({shorter(low)} to {shorter(high)})" for value, low, high in spans]
                rows.append(_cells(name_of(row), _LATENCIES[name], *told, f"{found['samples']:,}"))
    notes = ["In ms, over the requests of all repeats, with 95 % bootstrap intervals."]
    return Section("Every latency with its interval", ("target", "latency", *KINDS, "samples"), rows, notes)


def _recommended(record: Mapping[str, Any]) -> Section:
    every, rows = recommendations(record), []
    for each in every:
        taken = f"{each.targets[0]} or {each.others}" if each.others else each.targets[0]
        gives = f"{shorter(each.value)} {each.unit}"
        rows.append([Cell(each.use), Cell(taken, not each.others, True), Cell(gives, wide=True)])
    outputs = differing(record)
    notes = [
        "Where several targets are named, they are not distinguishable; the figures are those of the first.",
        f"{outputs}." if outputs else "All targets of one precision gave the same outputs.",
    ]
    return _with_known("Recommendations", ("use", "take", "which gives"), rows, [each.figures for each in every], notes)


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
    rows = [_cells(name_of(each | {"target": each["name"]}), each["precision"] or "not known")
            for each in record["targets"]]  # fmt: skip
    notes = [
        "Memory is the peak of a process that does nothing else; for a target in this process, of a fresh one. The "
        "roofline bound is the least time for reading weights and KV cache, or for the arithmetic, on this machine."
    ]
    found = _with_known("What each target needs", ("target", "weights"), rows, list(needs(record).values()), notes)
    return replace(found, rows=found.rows if len(found.heads) > 2 else [])


def _with_known(
    title: str, heads: Sequence[str], rows: Sequence[list[Cell]], known: Sequence[Known], notes: Sequence[str]
) -> Section:
    """A section whose rows go on with those figures of which any is known."""
    shown = [head for head in (known[0] if known else ()) if any(each[head] is not None for each in known)]
    longer = [[*row, *_cells(*(shorter(each[head]) for head in shown))] for row, each in zip(rows, known, strict=True)]
    return Section(title, (*heads, *shown), longer, notes)


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
            cells = [Cell(str(point["settings"]["requests"])), *(_figure(point, row, figure) for figure in shown)]
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
        known = [median_of(there, each) for each in ("p50_e2e_ms", "p99_e2e_ms", "p99_ttft_ms")]
        cells = [_figure(result or {}, row, "sustained_requests_per_second"), Cell(shorter(row["sweep"]["failed_at"]))]
        cells += [Cell(row["sweep"]["why"] or "not seen to fail", wide=True), *_cells(*map(shorter, known))]
        rows.append([Cell(name_of(row)), *cells])
    heads = ("target", "sustains, requests/s", "fails at", "why")
    notes = [
        "The same schedules for all, each rate played once. A target keeps up while answers come at 95 % of the rate "
        "or more and as many meet the objectives. Latencies are those at the sustained rate. Neighbouring rates are "
        "not distinguishable: a target is best only where every other failed below its rate.",
        *remarks(points),
    ]
    latencies = ("end to end p50, ms", "p99, ms", "first token p99, ms")
    return Section("Highest rate sustained", (*heads, *latencies), rows, notes, points, "saturation")


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
