"""Parts of a record's page: tables, who is best at what, static batches, and every latency with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from benchmarks.suite.figures.latency_metrics import LATENCIES
from benchmarks.suite.report.figures import Names, pair, shorter, steps_chart
from benchmarks.suite.report.rankings import Ranking, needs, rankings
from benchmarks.suite.report.recommendations import Answer, answers, differing
from benchmarks.suite.report.tables import HEADS, Point, batch_of, columns, median_of, name_of, over_floor, remarks

SHORT = HEADS | {
    "p50_ttft_ms": "first token p50",
    "p50_inter_token_ms": "inter-token p50",
    "p99_inter_token_ms": "inter-token p99",
    "p50_e2e_ms": "end to end p50",
    "prefill_ms": "prompts read",
    "step_ms": "a step",
    "cold_load_ms": "until ready",
    "cold_first_token_ms": "until the first token",
}
TEXTS = ("why it fails", "what it is", "best beyond the noise", "in order", "take", "which gives")
_LATENCIES = {
    "ttft": "first token",
    "inter_token": "between tokens",
    "tpot": "per further token",
    "e2e": "end to end",
    "queue": "waiting",
}
_MOST_RANKED = 3


def in_short(record: Mapping[str, Any]) -> str:
    """What to take for what, with the figures that one would quote, and whether all gave the same tokens."""
    every = answers(record)
    if not every:
        return ""
    columns_of = {
        "weights": [escape(each.precision or "not known") for each in every],
        "first token, ms": [shorter(each.first_token_ms, "") for each in every],
        "between tokens, ms": [shorter(each.between_tokens_ms, "") for each in every],
        "between tokens / floor": [shorter(each.over_floor, "") for each in every],
        "tokens/s": [shorter(each.tokens_per_second, "") for each in every],
        "peak memory, MiB": [shorter(each.memory_bytes and each.memory_bytes / 2**20, "") for each in every],
        "J/token": [shorter(each.joules_per_token, "") for each in every],
    }
    shown = {head: cells for head, cells in columns_of.items() if any(cells)}
    rows = []
    for place, each in enumerate(every):
        gives = f'<td class="text">{shorter(each.value)}&nbsp;{escape(each.unit)}</td>'
        rows.append((each.use, [_taken(each), gives, *(f"<td>{cells[place]}</td>" for cells in shown.values())]))
    outputs = differing(record)
    fewer = " What fewer bits cost in quality, the bundle's README.md says." if outputs else ""
    notes = [
        "Where several are named, they are not told apart, and the figures are the first's. Of latencies, medians.",
        f"{outputs}.{fewer}" if outputs else "All gave the same tokens.",
    ]
    said = "".join(f"<p class='note'>{escape(note)}</p>" for note in notes)
    return table(["take", "which gives", *shown], rows, "for", "asked brief") + said


def _taken(answer: Answer) -> str:
    also = f"<br>or {escape(answer.others)}" if answer.others else ""
    return f'<td class="text {"none" if also else "win"}"><b>{escape(answer.targets[0])}</b>{also}</td>'


def summary(record: Mapping[str, Any]) -> str:
    """Who is best at each question, by how much, and what each target needs."""
    rows = []
    for each in rankings(record):
        shade, best = ("win", each.winner) if each.winner else ("none", "not told apart")
        order = ", ".join(f"{escape(name)}&nbsp;{shorter(value)}" for name, value in each.order[:_MOST_RANKED])
        cells = [f'<td class="text {shade}">{escape(best)}</td>', f'<td class="text">{order}</td>', *_second(each)]
        rows.append((each.question, cells))
    if not rows:
        return _needs(record)
    note = (
        "Ratios are medians over the pairs of repeats that stood beside each other, with 95&nbsp;% intervals. The "
        "noise is by how much such a median differs, at 95&nbsp;%, where nothing does."
    )
    heads = ["best beyond the noise", "in order", "second / first", "noise"]
    return f"{table(heads, rows, 'question', 'asked')}<p class='note'>{note}</p>{_needs(record)}"


def _second(ranking: Ranking) -> list[str]:
    if ranking.second is None:
        return ["<td>once</td>" if ranking.figure.startswith("sustained") else "<td>too few repeats</td>", "<td></td>"]
    ratio, low, high, noise = ranking.second
    return [f'<td class="one">{ratio:.2f} ({low:.2f} to {high:.2f})</td>', f"<td>{noise:.1%}</td>"]


def _needs(record: Mapping[str, Any]) -> str:
    every = needs(record)
    shown = {
        "peak memory, MiB": [each.memory_bytes / 2**20 if each.memory_bytes else None for each in every],
        "cold first token, ms": [each.first_token_ms for each in every],
        "between tokens / floor": [each.over_floor for each in every],
        "largest batch / floor": [each.batch_over_floor for each in every],
        "J/token": [each.joules_per_token for each in every],
        "cost of 1M tokens": [each.cost_per_million_tokens for each in every],
    }
    shown = {head: column for head, column in shown.items() if any(value is not None for value in column)}
    if not shown:
        return ""
    rows = []
    for place, each in enumerate(every):
        cells = [f"<td>{escape(each.precision or 'not known')}</td>"]
        rows.append((each.target, cells + [f"<td>{shorter(column[place])}</td>" for column in shown.values()]))
    note = (
        "Memory is the highest of a process that does nothing else, a fresh one for what runs in this one. A floor is "
        "the least time that this machine needs to read weights and cache, or for the arithmetic."
    )
    return table(["weights", *shown], rows) + f"<p class='note'>{note}</p>"


def static_batches(points: Sequence[Point], names: Names) -> str:
    """Prefill and step by batch size, the winner of each batch shaded, and the same as curves."""
    figures = columns(points[0])
    heads = ["batch", *(SHORT[figure] for figure in figures), "floor of a step", "step / floor"]
    rows = []
    for point in points:
        for row in point["rows"]:
            cells = [f"<td>{batch_of(point)}</td>", *(cell(point, row, figure) for figure in figures)]
            cells += [
                f"<td>{shorter(row['floor_inter_token_ms'])}</td>",
                f"<td>{shorter(over_floor(row, 'step_ms'))}</td>",
            ]
            rows.append((name_of(row), cells))
    size = points[0]["settings"]["prompt"]["high"]
    note = (
        f"Prompts of {size} tokens, in ms; a step is a token for every row, the logits in the caller's hands. "
        "Only what runs in this process: no scheduler, no client."
    )
    charts = pair([steps_chart(points, figure, names) for figure in ("step_ms", "step_tokens_per_second")])
    return f"<p class='note'>{note}</p>{table(heads, rows)}{remarks_of(points)}{charts}"


def details(point: Point) -> str:
    """Each latency of each target: mean and quantiles with their 95 % intervals, folded away."""
    rows = []
    for row in point["rows"]:
        for name in LATENCIES:
            found = row["summary"]["latency"][name] if row["summary"] else None
            if found is None:
                continue
            cells = [f'<td class="text">{_LATENCIES[name]}</td>']
            for kind in ("mean", "p50", "p90", "p99"):
                value, low, high = (found[kind][part] * 1e3 for part in ("value", "low", "high"))
                cells.append(f"<td>{shorter(value)} ({shorter(low)} to {shorter(high)})</td>")
            rows.append((name_of(row), [*cells, f"<td>{found['samples']:,}</td>"]))
    if not rows:
        return ""
    heads = ["latency", "mean", "p50", "p90", "p99", "samples"]
    note = "<p class='note'>In ms, over the requests of all repeats, with 95 % bootstrap intervals.</p>"
    return f"<details><summary>Every latency with its interval</summary>{note}{table(heads, rows)}</details>"


def table(
    heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], first: str = "target", kind: str = ""
) -> str:
    """Rows of a name and finished cells, which scrolls by itself where it is too wide."""
    kinds = {True: ' class="text"', False: ""}
    marked = "".join(f"<th{kinds[head in TEXTS]}>{escape(head)}</th>" for head in heads)
    lines = [f"<tr><th>{first}</th>{marked}</tr>"]
    lines += [f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>" for name, cells in rows]
    return f'<div class="wide"><table class="{kind}">{"".join(lines)}</table></div>'


def cell(point: Point, row: Mapping[str, Any], figure: str) -> str:
    """A figure's median, shaded where it is better than every other beyond the noise."""
    won = ' class="win"' if point["winners"].get(figure) == row["target"] else ""
    return f"<td{won}>{shorter(median_of(row, figure))}</td>"


def remarks_of(points: Sequence[Point]) -> str:
    """What a reader must know of points that are shown together."""
    return "".join(f'<p class="note">{escape(remark)}</p>' for remark in remarks(points))
