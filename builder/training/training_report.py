"""A training run as one HTML page: curves, the validations as a table, samples."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from serving.support.html_page import language_attribute, page, section
from serving.support.svg_charts import Axis, chart, legend

REPORT_PAGE = "report.html"
_CURVES = (
    ("learning_rate", "Learning rate"),
    ("gradient_norm", "Gradient norm, before clipping"),
    ("tokens_per_second", "Throughput, tokens a second"),
)


def write_report(
    path: Path,
    name: str,
    about: Sequence[str],
    records: list[dict[str, float]],
    history: list[dict[str, Any]],
    samples: list[tuple[str, str]],
) -> None:
    """Write the page of a run so far.

    Args:
        path: the .html file.
        name: what the run is called.
        about: lines on the model and its settings.
        records: `builder.training.metrics_log.read_metrics`.
        history: one row a validation.
        samples: (prompt, continuation) of the last validation.
    """
    parts = [section("Run", "<p>" + "<br>".join(escape(line) for line in about) + "</p>")] if about else []
    losses = {"training": _points(records, "loss"), "validation": _points(records, "validation_loss")}
    parts += [_chart("Loss, nats a token", {side: points for side, points in losses.items() if points})]
    parts += [_chart(title, {key: _points(records, key)}) for key, title in _CURVES]
    parts.append(section("Validations", _table(history)))
    texts = "\n".join(
        f"<pre{language_attribute(prompt + text)}><b>{escape(prompt)}</b>{escape(text)}</pre>"
        for prompt, text in samples
    )
    parts.append(section("Samples of the last validation, greedy", texts))
    path.write_bytes(page(name, "".join(parts)))


def _points(records: list[dict[str, float]], key: str) -> list[tuple[float, float]]:
    return [(float(record["step"]), float(record[key])) for record in records if key in record]


def _chart(title: str, curves: dict[str, list[tuple[float, float]]]) -> str:
    if not any(curves.values()):
        return ""
    names = list(curves)
    return section(title, (legend(names) if len(names) > 1 else "") + chart(title, curves, Axis("step", is_tight=True)))


def _table(history: list[dict[str, Any]]) -> str:
    names = ("step", "training loss", "validation loss", "perplexity", "token accuracy")
    rows = ["<tr>" + "".join(f'<th class="number">{name}</th>' for name in names) + "</tr>"]
    for row in history:
        cells = (
            f"{row['step']:,}",
            "" if row["train_loss"] is None else f"{row['train_loss']:.4f}",
            f"{row['validation_loss']:.4f}",
            f"{row['validation_perplexity']:.2f}",
            f"{row['validation_accuracy']:.1%}",
        )
        rows.append("<tr>" + "".join(f'<td class="number">{cell}</td>' for cell in cells) + "</tr>")
    return '<div class="wide"><table>\n' + "\n".join(rows) + "\n</table></div>"
