"""What two records, or a record and a budget, say to each other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.suite.measure import SCHEMA
from benchmarks.suite.rows import HIGHER_IS_BETTER
from benchmarks.suite.statistics import unpaired
from serving.errors import GPT2BundleError, InputError
from serving.suggest import did_you_mean

_BUDGET = re.compile(r"\s*(\w+)\s*(<=|>=)\s*([0-9.eE+-]+)\s*")


# Best passes of one machine left alone differ by less.
_OTHER_MACHINE = 0.02


class BudgetError(GPT2BundleError):
    """A record does not keep a budget."""


def read_record(path: Path) -> dict[str, Any]:
    """Read a record of the suite. Raises InputError for anything else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["schema"] != SCHEMA:
            raise ValueError(f"its schema is {record['schema']!r}, not {SCHEMA!r}")
        for _, row in rows(record):
            for values in row["figures"].values():
                if not all(value is None or isinstance(value, (int, float)) for value in values):
                    raise ValueError("a figure is not a number")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a record of 'gpt2-bundle bench' with a scenario ({error})") from None
    found: dict[str, Any] = record
    return found


def rows(record: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Each (point, row)."""
    for point in record["points"]:
        for row in point["rows"]:
            yield point, row


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """A line for each judged figure of each row that both records have: what it was, is, and what may be said of it.

    The records were taken at different times, so their repeats are no pairs. Rows of other schedules are not compared.
    Where the machine's own rates were others, a last line says so: what looks like the target's may be the machine's.
    """
    earlier = {(point["schedule_sha256"], row["target"]): row for point, row in rows(before)}
    lines = []
    for point, row in rows(after):
        match = earlier.get((point["schedule_sha256"], row["target"]))
        if match is None:
            continue
        for figure in point["winners"]:
            old, new = (
                [value for value in each["figures"].get(figure, ()) if value is not None] for each in (match, row)
            )
            verdict = unpaired(new, old)
            if verdict.ratio is None or verdict.low is None or verdict.high is None:
                continue
            better = "higher" if figure in HIGHER_IS_BETTER else "lower"
            word = {better: "better", "equal": "equal", "unknown": "too few repeats"}.get(verdict.call, "WORSE")
            lines.append(
                f"{word:>15}  {row['target']}, {point['point']}, {figure}: {np.median(old):.3f} -> "
                f"{np.median(new):.3f} ({verdict.ratio - 1:+.1%}, {verdict.low - 1:+.1%} to {verdict.high - 1:+.1%})"
            )
    if not lines:
        raise InputError("the records have no target and schedule in common, so there is nothing to compare")
    return lines + _machine(before, after)


def _machine(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """How the machine's own rates have changed, if one has by more than 2 %."""
    said = []
    for rate, name in (("read_bandwidth_bytes_per_second", "memory reads"), ("fp32_flops_per_second", "products")):
        old, new = before.get(rate), after.get(rate)
        if old and new and abs(new / old - 1) > _OTHER_MACHINE:
            said.append(f"{name} {new / old - 1:+.1%}")
    return [f"{'the machine':>15}  was another: {', '.join(said)}; a target may owe as much to that"] if said else []


def check_budgets(record: Mapping[str, Any], budgets: list[str]) -> list[str]:
    """A line for each row's median that keeps its budget; raises BudgetError with those that do not.

    A budget is `FIGURE<=NUMBER` or `FIGURE>=NUMBER`. A row whose figure is null does not keep it;
    rows of scenarios that have no such figure are not asked.
    """
    kept: list[str] = []
    broken: list[str] = []
    for text in budgets:
        figure, sign, limit = _parse(text, record)
        for point, row in rows(record):
            if figure not in row["figures"]:
                continue
            values = [value for value in row["figures"][figure] if value is not None]
            where = f"{row['target']}, {point['point']}"
            if not values:
                broken.append(f"{where}: no {figure}")
                continue
            median = float(np.median(values))
            good = not row["errors"] and (median <= limit if sign == "<=" else median >= limit)
            failed = f" with {row['summary']['failed']} failed requests" if row["errors"] and row["summary"] else ""
            (kept if good else broken).append(f"{where}: {figure} is {median:.3f}{failed}, the budget {sign}{limit:g}")
    if broken:
        raise BudgetError("; ".join(broken))
    return kept


def _parse(text: str, record: Mapping[str, Any]) -> tuple[str, str, float]:
    match = _BUDGET.fullmatch(text)
    known = list(dict.fromkeys(figure for _, row in rows(record) for figure in row["figures"]))
    try:
        if match is None:
            raise ValueError
        limit = float(match[3])
    except ValueError:
        raise InputError(f"the budget {text!r} is not FIGURE<=NUMBER or FIGURE>=NUMBER") from None
    if match[1] not in known:
        raise InputError(f"the record has no figure {match[1]!r}{did_you_mean(match[1], known)}")
    return match[1], match[2], limit
