"""A record as one HTML page: no scripts, nothing from outside, light and dark, readable on a phone."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from benchmarks.suite.report.figures import Names, cdf, latency_throughput, pair, steps_chart
from benchmarks.suite.report.sections import Section, details, sections
from benchmarks.suite.report.tables import client_overhead, name_of
from serving.support.html_page import page, section
from serving.support.svg_charts import legend

_STYLE = """
body { max-width: 62rem; }
table { border-collapse: separate; border-spacing: 0; }
 h2 { margin-top: 2.2rem; }
th, td { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child, .text { text-align: left; }
th { font-weight: 600; color: var(--soft); white-space: normal; vertical-align: bottom; min-width: 3.2rem; }
td.win { background: var(--win); font-weight: 600; }
.note { font-size: 13px; color: var(--soft); }
.legend { background: var(--paper); padding: .4rem 0; font-size: 13px; position: sticky; top: 0; z-index: 1; }
.pair { grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: .5rem 1.5rem; }
td.text { white-space: normal; min-width: 9rem; }
tr > :first-child { position: sticky; left: 0; background: var(--paper); white-space: normal; min-width: 6rem; }
summary { cursor: pointer; color: var(--soft); }
figure { margin: 0; } figcaption { font-size: 13px; font-weight: 600; margin-bottom: .2rem; }
@media (max-width: 40rem) { th, td { padding: .2rem .4rem; font-size: 13px; } body { margin: 1rem auto; }
  .legend { font-size: 11px; line-height: 1.4; } .legend b { margin-right: .5rem; } .legend svg { width: 18px; } }
"""


def to_page(record: Mapping[str, Any]) -> bytes:
    """Return the whole page, UTF-8."""
    names: Names = {target["name"]: place for place, target in enumerate(record["targets"])}
    drawn = [_opening(record)]
    has_charts = False
    for each in sections(record):
        if each.points and not has_charts:
            has_charts = True
            drawn.append(legend([name_of(target | {"target": target["name"]}) for target in record["targets"]]))
            drawn.append(section("Latency and throughput", latency_throughput(record, names)))
        drawn.append(section(each.title, _table(each) + _charts(each, names)))
    return page(f"{record['bundle']}: benchmark", "\n".join(drawn), _STYLE)


def _opening(record: Mapping[str, Any]) -> str:
    machine, settings, others = record["environment"], record["settings"], record["others_cpu_share"]
    limits = {name: value for name, value in settings["objectives"].items() if value is not None}
    good = ", ".join(f"{name} within {value * 1e3:g} ms" for name, value in limits.items())
    sessions, price = record.get("sessions", ()), settings.get("price_per_hour")
    sentences = [
        f"Measured in {len(sessions)} runs, each point whole in one." if len(sessions) > 1 else "",
        "" if others is None else f"Other programs took {others:.0%} of the cores meanwhile.",
        _energy(record.get("energy")),
        client_overhead(record),
        f"Goodput counts requests with {good}." if good else "",
        f"Cost is at a price of {price:g} an hour." if price else "",
        ", ".join(f"{name} {version}" for name, version in machine["versions"].items()) + ".",
    ]
    return (
        f"<p>{escape(machine['cpu'])}, {machine['cores']} cores, {escape(machine['date'][:10])}; "
        f"{settings['repeats']} repeats, targets taking turns. Latencies are in ms, start at the scheduled time, and "
        "are medians over the repeats. A shaded figure is better than every other beyond the noise; where none is "
        "shaded, the targets are not distinguishable.</p>"
        f'<p class="note">{" ".join(escape(sentence) for sentence in sentences if sentence)}</p>'
    )


def _energy(energy: Mapping[str, Any] | None) -> str:
    if energy is None:
        return "Energy and power are not measured: this machine has no counters that this user can read."
    idle = {"processor": energy["idle_cpu_watts"], "GPU": energy["idle_gpu_watts"]}
    drawn = " and ".join(f"{watts:.0f} W ({part})" for part, watts in idle.items() if watts is not None)
    gpus = f" {', '.join(energy['gpus'])}, driver {energy['driver']}." if energy["gpus"] else ""
    return f"Before the run the idle machine drew {drawn}, which is included in all energy figures.{gpus}"


def _charts(each: Section, names: Names) -> str:
    if each.scenario == "steps":
        return pair([steps_chart(each.points, figure, names) for figure in ("step_ms", "step_tokens_per_second")])
    if each.scenario not in ("single", "offline", "server", "concurrency"):
        return ""
    (point,) = each.points
    intervals = details(point)
    folded = f"<details><summary>{intervals.title}</summary>{_table(intervals)}</details>" if intervals.rows else ""
    return pair([cdf(point, latency, names) for latency in ("ttft", "inter_token")]) + folded


def _table(each: Section) -> str:
    """The rows, which scroll by themselves where they are too wide, and the notes."""
    wide = {place for row in each.rows for place, cell in enumerate(row) if cell.wide}
    texts = {True: ' class="text"', False: ""}
    lines = ["".join(f"<th{texts[place in wide]}>{escape(head)}</th>" for place, head in enumerate(each.heads))]
    for row in each.rows:
        kinds = [" ".join(["text"] * cell.wide + ["win"] * cell.best) for cell in row]
        lines.append("".join(
            f'<td class="{kind}">{escape(cell.text)}</td>' if kind else f"<td>{escape(cell.text)}</td>"
            for kind, cell in zip(kinds, row, strict=True)
        ))  # fmt: skip
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in each.notes)
    return f'<div class="wide"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>{notes}'
