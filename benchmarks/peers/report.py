"""A record of contests as Markdown: who is ahead at each precision, batch size and phase, and who made which tokens."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.contest import OWN

# Share of the cores that others may take during a turn; a system at rest takes less.
_TOLERATED = 0.05


def table(record: dict[str, Any]) -> str:
    """A line for each contestant of each contest; the fastest prefill and step are bold."""
    lines = [
        "| precision | batch | contestant | prefill, ms | prefill, GOP/s | decode step, ms (95 %) | tokens/s "
        "| floor / step | the step over ours | tokens |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for contest in record["contests"]:
        rows = contest["rows"]
        own = next(row for row in rows if row["contestant"] == OWN)
        for row in rows:
            prefill, decode = row["prefill_ms"], row["decode_ms"]
            lines.append(
                f"| {contest['precision']} | {contest['batch_size']} | {row['contestant']} "
                f"| {_bold(prefill['median'], rows, 'prefill_ms', 1)} "
                f"| {row['prefill_operations_per_second'] / 1e9:,.0f} "
                f"| {_bold(decode['median'], rows, 'decode_ms', 2)} ({decode['low']:.2f} to {decode['high']:.2f}) "
                f"| {row['decode_tokens_per_second']:,.0f} | {row['floor_over_decode']:.2f} "
                f"| {decode['median'] / own['decode_ms']['median']:.2f} | {agreement(row, own)} |"
            )
    return "\n".join(lines)


def conditions(record: dict[str, Any]) -> str:
    """A line for each contest: what the machine could do meanwhile, who failed, and whether we were ahead."""
    lines = []
    for contest in record["contests"]:
        rows = contest["rows"]
        ahead = [
            f"{phase.removesuffix('_ms')} {'ahead' if best(rows, phase) == OWN else 'behind ' + best(rows, phase)}"
            for phase in ("prefill_ms", "decode_ms")
        ]
        line = (
            f"{contest['precision']}, batch {contest['batch_size']}: {', '.join(ahead)}; "
            f"{contest['read_bandwidth_bytes_per_second'] / 1e9:.1f} GB/s, "
            f"{contest['numpy_fp32_flop_per_second'] / 1e9:.0f} GFLOP/s by numpy"
        )
        disturbed = max((row["disturbance"] or 0.0) for row in rows)
        if disturbed > _TOLERATED:
            line += f"; DISTURBED: other processes took up to {disturbed:.0%} of the cores, repeat it"
        failed = [f"{name} failed ({error})" for name, error in contest["failed"].items()]
        lines.append("; ".join([line, *failed]))
    return "\n".join(lines)


def best(rows: list[dict[str, Any]], phase: str) -> str:
    """The contestant with the least median of `phase`."""
    name: str = min(rows, key=lambda row: row[phase]["median"])["contestant"]
    return name


def agreement(row: dict[str, Any], own: dict[str, Any]) -> str:
    """How far a contestant's greedy tokens are ours."""
    if row is own:
        digests = row["tokens_sha256"]
        return f"`{digests[0][:8]}`" if len(digests) == 1 else "DIFFER between rounds"
    if row["tokens_sha256"] == own["tokens_sha256"]:
        return "the same"
    theirs, ours = (list(zip(*tokens, strict=True)) for tokens in (row["tokens"], own["tokens"]))
    same = sum(their == our for their, our in zip(theirs, ours, strict=True))
    return f"{same} of {len(ours)} rows the same"


def _bold(value: float, rows: list[dict[str, Any]], phase: str, digits: int) -> str:
    text = f"{value:,.{digits}f}"
    return f"**{text}**" if value == min(row[phase]["median"] for row in rows) else text
