"""A training run as one HTML page: curves as inline SVG, the validations as a table, samples; light and dark."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

REPORT_PAGE = "report.html"
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 220, 64, 28, 10
_CURVES = (
    ("loss", "Training loss, nats a token"),
    ("validation_loss", "Validation loss, nats a token"),
    ("learning_rate", "Learning rate"),
    ("gradient_norm", "Gradient norm, before clipping"),
    ("tokens_per_second", "Throughput, tokens a second"),
)
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --faint: #d5dae0; --line: #0b62c4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --paper: #14171b; --faint: #3a414b; --line: #6cb0ff; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 44rem; padding: 0 1rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 11px; }
.axis { stroke: var(--faint); } .curve { fill: none; stroke: var(--line); stroke-width: 1.6; }
.dot { fill: var(--line); }
table { border-collapse: collapse; width: 100%; } td, th { border-bottom: 1px solid var(--faint); padding: .2rem .4rem;
  text-align: right; }
pre { white-space: pre-wrap; border-left: 3px solid var(--faint); padding-left: .8rem; } pre b { color: var(--line); }
"""


def write_report(
    path: Path,
    name: str,
    records: list[dict[str, float]],
    history: list[dict[str, Any]],
    samples: list[tuple[str, str]],
) -> None:
    """Write the page of a run so far.

    Args:
        path: the .html file.
        name: what the run is called.
        records: `builder.metrics_log.read_metrics`.
        history: one row a validation.
        samples: (prompt, continuation) of the last validation.
    """
    parts = [f"<h1>{html.escape(name)}</h1>"]
    for key, title in _CURVES:
        points = [(float(record["step"]), float(record[key])) for record in records if key in record]
        if points:
            parts.append(f"<h2>{title}</h2>\n{_chart(points, title)}")
    parts.append("<h2>Validations</h2>\n" + _table(history))
    if samples:
        parts.append("<h2>Samples of the last validation, greedy</h2>")
        parts += [f"<pre><b>{html.escape(prompt)}</b>{html.escape(text)}</pre>" for prompt, text in samples]
    page = (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(name)}</title>\n<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n"
    )
    # A prompt that was cut within a character has no form in UTF-8.
    path.write_text(page, encoding="utf-8", errors="replace")


def _chart(points: list[tuple[float, float]], title: str) -> str:
    """A curve of (step, value) with the ranges of both written at the axes."""
    steps, values = zip(*points, strict=True)
    low, high = min(values), max(values)
    right, bottom = _WIDTH - 10, _HEIGHT - _BOTTOM
    per_step = (right - _LEFT) / (max(steps) - min(steps) or 1)
    per_value = (bottom - _TOP) / (high - low or 1)
    places = [(_LEFT + (step - min(steps)) * per_step, bottom - (value - low) * per_value) for step, value in points]
    if len(points) == 1:
        curve = f'<circle class="dot" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3"/>'
    else:
        curve = '<polyline class="curve" points="' + " ".join(f"{x:.1f},{y:.1f}" for x, y in places) + '"/>'
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}">'
        f'<path class="axis" fill="none" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>{curve}'
        f'<text x="{_LEFT - 6}" y="{_TOP + 8}" text-anchor="end">{high:.4g}</text>'
        f'<text x="{_LEFT - 6}" y="{bottom}" text-anchor="end">{low:.4g}</text>'
        f'<text x="{_LEFT}" y="{_HEIGHT - 8}">step {min(steps):,.0f}</text>'
        f'<text x="{right}" y="{_HEIGHT - 8}" text-anchor="end">{max(steps):,.0f}</text></svg>'
    )


def _table(history: list[dict[str, Any]]) -> str:
    head = "<tr><th>step<th>training loss<th>validation loss<th>perplexity<th>token accuracy</tr>"
    rows = []
    for row in history:
        train_loss = "" if row["train_loss"] is None else f"{row['train_loss']:.4f}"
        rows.append(
            f"<tr><td>{row['step']:,}<td>{train_loss}<td>{row['validation_loss']:.4f}"
            f"<td>{row['validation_perplexity']:.2f}<td>{row['validation_accuracy']:.1%}</tr>"
        )
    return "<table>\n" + "\n".join([head, *rows]) + "\n</table>"
