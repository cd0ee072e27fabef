"""A record as one HTML page: no scripts, nothing from outside, light and dark, readable on a phone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from benchmarks.suite.report.figures import Names, cdf, grid_table, latency_throughput, roofline, shorter, timelines
from benchmarks.suite.report.html_sections import (
    SHORT,
    cell,
    details,
    in_short,
    remarks_of,
    static_batches,
    summary,
    table,
)
from benchmarks.suite.report.tables import (
    Point,
    at_sustained,
    client_overhead,
    columns,
    groups,
    median_of,
    name_of,
    over_floor,
    sweep_of,
)
from serving.support.html_page import page, section
from serving.support.svg_charts import legend

_TITLES = {
    "steps": "The graph alone, by batch",
    "single": "One request at a time",
    "offline": "All at once",
    "server": "Requests that wait for nobody",
    "concurrency": "Several clients",
    "saturation": "Rising rates",
    "grid": "Prompt and output lengths",
    "cold-start": "Cold starts",
}
_STYLE = """
body { max-width: 62rem; }
table { border-collapse: separate; border-spacing: 0; }
 h2 { margin-top: 2.2rem; } h3 { font-size: 15px; margin: .6rem 0 .2rem; }
th, td { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child, .text { text-align: left; }
th { font-weight: 600; color: var(--soft); white-space: normal; vertical-align: bottom; min-width: 3.2rem; }
td.win { background: var(--win); font-weight: 600; }
.none { color: var(--soft); } .note { font-size: 13px; color: var(--soft); }
.legend { background: var(--paper); padding: .4rem 0; font-size: 13px; position: sticky; top: 0; z-index: 1; }
.pair { grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: .5rem 1.5rem; }
.asked td, .asked th { vertical-align: top; white-space: normal; } .asked td.one { white-space: nowrap; }
.brief td.text { min-width: 7.5rem; } .brief td:first-child { min-width: 7rem; }
.heat td, .heat th { text-align: center; } td.text { white-space: normal; min-width: 12rem; }
tr > :first-child { position: sticky; left: 0; background: var(--paper); }
summary { cursor: pointer; color: var(--soft); }
figure { margin: 0; } figcaption { font-size: 13px; font-weight: 600; margin-bottom: .2rem; }
@media (max-width: 40rem) { th, td { padding: .2rem .4rem; font-size: 13px; } body { margin: 1rem auto; }
  .legend { font-size: 11px; line-height: 1.4; } .legend b { margin-right: .5rem; } .legend svg { width: 18px; }
  .asked td:first-child { min-width: 6.5rem; } .asked td.text { min-width: 5.5rem; } }
"""


def to_page(record: Mapping[str, Any]) -> bytes:
    """The whole page, UTF-8."""
    names: Names = {target["name"]: place for place, target in enumerate(record["targets"])}
    parts = [_opening(record), section("In short", in_short(record)), section("Question by question", summary(record))]
    parts.append(legend([name_of(each | {"target": each["name"]}) for each in record["targets"]]))
    parts.append(section("Latency and throughput", latency_throughput(record, names)))
    for scenario, points in groups(record):
        title = _TITLES.get(scenario, scenario)
        if scenario == "steps":
            parts.append(section(title, static_batches(points, names)))
        elif scenario == "saturation":
            parts.append(section(title, _sweep(points)))
        elif scenario == "grid":
            parts.append(section(title, grid_table(points) + remarks_of(points)))
        else:
            what = "" if scenario in ("single", "cold-start") else f": {points[0]['point']}"
            parts.append(section(f"{title}{what}", _point(points[0], names)))
    parts.append(section("How far from the machine's limits", roofline(record, names)))
    parts.append(section("Targets", _targets(record)))
    return page(f"{record['bundle']}: what it takes to run it", "\n".join(parts), _STYLE)


def _opening(record: Mapping[str, Any]) -> str:
    machine, settings = record["environment"], record["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    energy = record.get("energy")
    drawn = "Nothing here tells energy or power."
    if energy:
        idle = {"processor": energy["idle_cpu_watts"], "GPU": energy["idle_gpu_watts"]}
        said = " and ".join(f"{watts:.0f} W ({part})" for part, watts in idle.items() if watts is not None)
        drawn = f"Idle, before anything was loaded, the machine drew {said}; that is in the energy too."
    limits = {name: value for name, value in settings["objectives"].items() if value is not None}
    good = ", ".join(f"{name} within {value * 1e3:g} ms" for name, value in limits.items())
    price, others = settings["price_per_hour"], record["others_cpu_share"]
    sessions = record.get("sessions", ())
    sentences = [
        f"Measured in {len(sessions)} runs, each point whole in one." if len(sessions) > 1 else "",
        "" if others is None else f"Other programs took {others:.0%} of the cores meanwhile.",
        drawn,
        client_overhead(record),
        f"A request is good with {good}." if good else "",
        f"Cost is at {price:g} an hour." if price else "",
        f"{versions}.",
    ]
    return (
        f"<p>{escape(machine['cpu'])}, {machine['cores']} cores, {escape(machine['date'][:10])}; "
        f"{settings['repeats']} repeats, targets taking turns. Latencies are in ms, begin at the scheduled moment, and "
        "are medians over the repeats. A shaded figure is better than every other beyond the noise; where none is "
        "shaded, nothing is.</p>"
        f'<p class="note">{" ".join(escape(sentence) for sentence in sentences if sentence)}</p>'
    )


def _point(point: Point, names: Names) -> str:
    shown = columns(point)
    floors = point["scenario"] != "cold-start"
    # What runs in this process has none of its own; "In short" has that of a fresh one.
    known = [row["peak_rss_bytes"] is not None for row in point["rows"]]
    memory = all(known) or (not floors and any(known))
    heads = [SHORT[figure] for figure in shown] + ["floor", "/ floor"] * floors + ["peak memory, MiB"] * memory
    rows = []
    for row in point["rows"]:
        cells = [cell(point, row, figure) for figure in shown]
        if floors:
            floors_of = row["floor_inter_token_ms"], over_floor(row, "p50_inter_token_ms")
            cells += [f"<td>{shorter(each)}</td>" for each in floors_of]
        if memory:
            held = row["peak_rss_bytes"]
            cells.append(f"<td>{shorter(held / 2**20 if held else None)}</td>")
        rows.append((name_of(row), cells))
    found = table(heads, rows) + remarks_of([point])
    if not floors:
        return f"{found}<p class='note'>From the start of a process, its files in the page cache, in ms.</p>"
    charts = "".join(cdf(point, latency, names) for latency in ("ttft", "inter_token"))
    return f'{found}<div class="pair">{charts}</div>{details(point)}{timelines(point)}'


def _sweep(points: Sequence[Point]) -> str:
    result = sweep_of(points)
    if result is None:
        return ""
    heads = ["sustains, requests/s", "fails at", "end to end p50", "p99", "first token p99", "why it fails"]
    rows = []
    for row in result["rows"]:
        there = at_sustained(points, row)
        figures = [
            median_of(there, figure) if there else None for figure in ("p50_e2e_ms", "p99_e2e_ms", "p99_ttft_ms")
        ]
        cells = [cell(result, row, "sustained_requests_per_second"), f"<td>{shorter(row['sweep']['failed_at'])}</td>"]
        cells += [f"<td>{shorter(figure)}</td>" for figure in figures]
        cells.append(f'<td class="text">{escape(row["sweep"]["why"] or "not seen to fail")}</td>')
        rows.append((name_of(row), cells))
    note = (
        "The same schedules for all, each rate played once. A target keeps up while answers come at 95 % of the rate "
        "or more and as many are good. Latencies are those at the rate that it sustains. Neighbouring rates are not "
        "told apart: the best is shaded only where every other failed below it."
    )
    return f"{table(heads, rows)}<p class='note'>{note}</p>{remarks_of(points)}"


def _targets(record: Mapping[str, Any]) -> str:
    rows = []
    for target in record["targets"]:
        label = target["label"] + (" (stand-in)" if target["stand_in"] else "")
        warm = f"{target['warm_after']} requests" if target["warm"] else "never steady"
        others = (target["precision"] or "not known", shorter(target["load_seconds"]), warm)
        cells = [f'<td class="text">{escape(label)}</td>', *(f"<td>{escape(each)}</td>" for each in others)]
        rows.append((str(target["name"]), cells))
    note = ""
    if record["read_bandwidth_bytes_per_second"]:
        note = (
            "<p class='note'>The floor of a token is the time to read all weights and one row's cache once, or to do "
            f"its arithmetic where that is longer, at {record['read_bandwidth_bytes_per_second'] / 1e9:.1f} GB/s"
            + (f" and {rate / 1e9:.0f} GFLOP/s (float32)" if (rate := record["fp32_flops_per_second"]) else "")
            + ", the best measured between the repeats. It is no bound where the weights fit the last-level cache.</p>"
        )
    missing = "".join(
        f"<p class='note'>{escape(name)} was not measured: {escape(why)}</p>"
        for name, why in record.get("not_measured", {}).items()
    )
    return table(["what it is", "weights", "load, s", "warm after"], rows) + missing + note
