"""What two records, or a record and a budget, say to each other."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.common.statistics import SAME, UNKNOWN, Verdict, unpaired
from benchmarks.suite.figures.record_rows import HIGHER_IS_BETTER
from benchmarks.suite.record import record_rows
from benchmarks.suite.report.tables import name_of
from serving.errors import GPT2BundleError, InputError
from serving.support.suggestions import did_you_mean

_BUDGET = re.compile(r"\s*(\w+)\s*(<=|>=)\s*([0-9.eE+-]+)\s*")


# Best passes of one machine left alone differ by less.
_OTHER_MACHINE = 0.02
# Share of the cores that other programs took, from which on latencies are theirs too.
_MUCH_FOR_OTHERS = 0.05


class BudgetError(GPT2BundleError):
    """A record does not keep a budget."""


@dataclass(frozen=True)
class Change:
    """One figure of one row in two records. `word` is better, WORSE, not distinguishable or too few repeats."""

    where: str
    figure: str
    before: float
    after: float
    verdict: Verdict
    word: str

    def __str__(self) -> str:
        ratio, low, high = (value - 1 for value in (self.verdict.ratio, self.verdict.low, self.verdict.high) if value)
        moved = f"{ratio:+.1%}, {low:+.1%} to {high:+.1%}"
        return f"{self.word:>19}  {self.where}, {self.figure}: {self.before:.3f} -> {self.after:.3f} ({moved})"


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Each judged figure of each row that both records have.

    The records were taken at different times, so their repeats are no pairs. Rows of other schedules are not compared.
    Raises InputError where nothing is left to compare.
    """
    earlier = {_key(point, row): row for point, row in record_rows(before)}
    found = []
    for point, row in record_rows(after):
        match = earlier.get(_key(point, row))
        if match is None:
            continue
        for figure in point["winners"]:
            old, new = (
                [value for value in each["figures"].get(figure, ()) if value is not None] for each in (match, row)
            )
            verdict = unpaired(new, old)
            if verdict.ratio is None:
                continue
            better = "higher" if figure in HIGHER_IS_BETTER else "lower"
            word = {better: "better", SAME: SAME, UNKNOWN: UNKNOWN}.get(verdict.call, "WORSE")
            where = f"{name_of(row)}, {point['point']}"
            found.append(Change(where, figure, float(np.median(old)), float(np.median(new)), verdict, word))
    if not found:
        raise InputError(
            "the records have no target and schedule in common, so there is nothing to compare; measure both with the "
            "same scenarios and options, on bundles of the same text, or play one's --save-schedule with --schedule"
        )
    return found


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """A line for each of `changes`, the worse ones last, and for what else there is to know.

    That is how many there are of each word (of those with too few repeats nothing else), what one of the records has
    alone, what failed, and whether bundle or machine was another, to which a target may owe as much.
    """
    found = changes(before, after)
    counts = Counter(change.word for change in found)
    told = ", ".join(f"{count} {word}" for word, count in counts.most_common())
    lines = [str(change) for word in (SAME, "better", "WORSE") for change in found if change.word == word]
    lines.append(f"{'in all':>19}  {told}")
    lines += [f"{'failed':>19}  {sentence}" for sentence in _failed(after)]
    for name, one, other in (("before", before, after), ("after", after, before)):
        alone = _alone(one, other)
        lines += [f"{'only ' + name:>19}  {'; '.join(alone)}"] if alone else []
    if before.get("bundle") != after.get("bundle"):
        lines.append(f"{'the bundle':>19}  was {before.get('bundle')}, is {after.get('bundle')}")
    return lines + _machine(before, after)


def check_baseline(record: Mapping[str, Any], baseline: Mapping[str, Any], allowed: float) -> list[str]:
    """What `compare` says, if no figure is worse than in `baseline` by more than the share `allowed`.

    Raises BudgetError with those that are beyond the noise, and with rows that failed or that only the baseline has;
    InputError where no figure has the repeats to be told from another.
    """
    found = changes(baseline, record)
    if all(change.verdict.call == UNKNOWN for change in found):
        raise InputError("the records have too few repeats to tell anything; measure both with --repeats 5 or more")
    broken = [str(change).strip() for change in found if _is_past(change, allowed)]
    broken += [*_failed(record), *(f"{where}: not in the record" for where in _alone(baseline, record))]
    if broken:
        raise BudgetError("; ".join(broken))
    return compare(baseline, record)


def _is_past(change: Change, allowed: float) -> bool:
    ratio = change.verdict.ratio
    if change.word != "WORSE" or ratio is None:
        return False
    return (1 / ratio if change.figure in HIGHER_IS_BETTER else ratio) > 1 + allowed


def _key(point: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[Any, Any]:
    return point["schedule_sha256"], row["target"]


def _alone(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The rows of one record that the other lacks."""
    theirs = {_key(point, row) for point, row in record_rows(other)}
    return [f"{name_of(row)}, {point['point']}" for point, row in record_rows(one) if _key(point, row) not in theirs]


def _failed(record: Mapping[str, Any]) -> list[str]:
    return [
        f"{name_of(row)}, {point['point']}: {row['errors'][0]}" for point, row in record_rows(record) if row["errors"]
    ]


def _machine(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """How the machine's own rates have changed, if one has by more than 2 %, and whether it was lent to others."""
    said = []
    for rate, name in (("read_bandwidth_bytes_per_second", "memory reads"), ("fp32_flops_per_second", "products")):
        old, new = before.get(rate), after.get(rate)
        if old and new and abs(new / old - 1) > _OTHER_MACHINE:
            said.append(f"{name} {new / old - 1:+.1%}")
    lines = [f"{'the machine':>19}  was another: {', '.join(said)}; a target may owe as much to that"] if said else []
    shares = [record.get("others_cpu_share") or 0.0 for record in (before, after)]
    if max(shares) > _MUCH_FOR_OTHERS:
        lines.append(
            f"{'others':>19}  took {shares[0]:.0%} of the cores before and {shares[1]:.0%} after; "
            "measure both again on a machine left alone"
        )
    return lines


def check_budgets(record: Mapping[str, Any], budgets: list[str]) -> list[str]:
    """A line for each row's median that keeps its budget; raises BudgetError with those that do not.

    A budget is `FIGURE<=NUMBER` or `FIGURE>=NUMBER`. A row whose figure is null does not keep it;
    rows of scenarios that have no such figure are not asked.
    """
    kept: list[str] = []
    broken: list[str] = []
    for text in budgets:
        figure, sign, limit = _parse(text, record)
        for point, row in record_rows(record):
            if figure not in row["figures"]:
                continue
            values = [value for value in row["figures"][figure] if value is not None]
            where = f"{name_of(row)}, {point['point']}"
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
    known = list(dict.fromkeys(figure for _, row in record_rows(record) for figure in row["figures"]))
    try:
        if match is None:
            raise ValueError
        limit = float(match[3])
    except ValueError:
        raise InputError(f"the budget {text!r} is not FIGURE<=NUMBER or FIGURE>=NUMBER") from None
    if match[1] not in known:
        raise InputError(f"the record has no figure {match[1]!r}{did_you_mean(match[1], known)}")
    return match[1], match[2], limit
