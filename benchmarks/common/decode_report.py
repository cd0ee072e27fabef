"""A benchmark's record as a table that a person reads."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_report(record: dict[str, Any], console: Console | None = None) -> None:
    """Print the record of `decode_step.measure` and, as a sentence, whether all targets gave the same tokens."""
    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 120  # A log or a file has no edge; a table squeezed into 80 columns reads badly.
    environment = record["environment"]
    table = Table(title=f"{record['bundle']}: {record['prompt_tokens']} prompt tokens, ms (95 % interval)")
    for name in ("target", "batch"):
        table.add_column(name)
    for name in ("prefill", "decode step", "tokens/s", "floor", "decode / floor"):
        table.add_column(name, justify="right")
    for row in record["rows"]:
        table.add_row(
            row["target"],
            str(row["batch_size"]),
            _interval(row["prefill_ms"]),
            _interval(row["decode_ms"]),
            _number(row["decode_tokens_per_second"], 0),
            _number(row["floor_ms"], 2),
            _number(row["decode_over_floor"], 2),
        )
    console.print(table)
    console.print(
        f"floor: weights and cache read once at {record['read_bandwidth_bytes_per_second'] / 1e9:.1f} GB/s, measured "
        f"between the repeats on {environment['cores']} cores of {environment['cpu']}",
        soft_wrap=True,
    )
    cache = environment["last_level_cache_bytes"]
    if cache and min(row["bytes_per_step"] for row in record["rows"]) < cache:
        console.print(
            f"some steps read less than the last-level cache of {cache / 2**20:.0f} MiB: memory is not their floor",
            soft_wrap=True,
        )
    console.print(_agreement(record["rows"]), soft_wrap=True)


def _interval(summary: dict[str, Any] | None) -> str:
    return f"{summary['median']:.2f} ({summary['low']:.2f} to {summary['high']:.2f})" if summary else "none"


def _number(value: float | None, digits: int) -> str:
    return "none" if value is None else f"{value:,.{digits}f}"


def _agreement(rows: list[dict[str, Any]]) -> str:
    """Whether targets of one precision gave the same tokens; between two precisions they may differ."""
    differing = set()
    for precision, size in {(row["precision"], row["batch_size"]) for row in rows}:
        alike = [row for row in rows if (row["precision"], row["batch_size"]) == (precision, size)]
        if len({digest for row in alike for digest in row["tokens_sha256"]}) > 1:
            differing.add(size)
    if differing:
        sizes = ", ".join(map(str, sorted(differing)))
        return f"TOKENS DIFFER between targets or repeats at batch {sizes}: the rows are not comparable"
    several = len({row["precision"] for row in rows}) > 1
    return f"all targets{' of one precision' if several else ''} gave the same tokens"
