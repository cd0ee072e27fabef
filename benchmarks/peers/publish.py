"""`python -m benchmarks.peers.publish`: the charts and tables of the newest peers record, in README.md and docs/.

The newest `benchmarks/results/DATE-peers-cpu.json` fills the blocks between `<!-- peers:NAME -->` and
`<!-- /peers:NAME -->`, and two SVG charts, for light and for dark pages. With `--check` nothing is written, and the
exit code is 1 if a page or a chart is not what the record gives.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import click

from benchmarks.common.runtime_process import ROOT
from benchmarks.common.standalone import run
from benchmarks.common.statistics import SAME, UNKNOWN
from benchmarks.peers.runtimes import PRECISIONS, own
from benchmarks.suite.record import read_record
from benchmarks.suite.report.tables import median_of
from benchmarks.suite.resume import RATES
from serving.errors import GPT2BundleError, InputError

PAGES = ("README.md", "README.zh-CN.md", "docs/benchmarks.md")
CHARTS = "docs/images/peers-{theme}.svg"
NAMES = {
    "ort": "gpt2-bundle",
    "openvino": "OpenVINO",
    "llama": "llama.cpp",
    "genai": "ONNX Runtime GenAI",
    "ctranslate2": "CTranslate2",
    "torch": "transformers (torch)",
    "keras_hub": "KerasHub",
    "savedmodel": "gpt2-bundle, TensorFlow",
}
_PICTURE = (
    '<picture>\n  <source media="(prefers-color-scheme: dark)" srcset="docs/images/peers-dark.svg">\n'
    '  <img alt="{alt}" src="docs/images/peers-light.svg">\n</picture>\n'
)
# By what ends the names of a language's blocks.
_WORDS = {
    "": {
        "alt": "Decode speed of each runtime relative to the fastest",
        "batch": "batch",
        "machine": "Milliseconds of a decode step for all rows; {cpu}, {cores} cores, {date}, "
        "prompts of {tokens} tokens. Bold: {bold}.",
        "judged": "no other runtime is faster beyond the noise",
        "not_judged": "the fastest median, too few rounds for a verdict",
    },
    "_zh": {
        "alt": "各运行时相对于最快者的 decode 速度",
        "batch": "批大小",
        "machine": "整个批次一个 decode 步的毫秒数；{cpu}，{cores} 核，{date}，提示 {tokens} 个 token。粗体：{bold}。",
        "judged": "没有其他运行时的优势超出噪声",
        "not_judged": "中位数最快，轮数不足以下结论",
    },
}
_SUMMARY = ("ort", "openvino", "llama", "torch")
# Share of the cores that other programs may take during a point; a system at rest takes less.
_TOLERATED = 0.05
_BLOCK = re.compile(r"(<!-- peers:(\w+) -->\n).*?(<!-- /peers:\2 -->)", re.DOTALL)
_INK = {"light": ("#1b1f24", "#d5dae0"), "dark": ("#e4e8ee", "#3a414b")}
_COLOURS = {
    "light": ("#0b62c4", "#8a94a3", "#c2410c", "#15803d", "#9333ea", "#b3005e", "#a16207", "#0e7490"),
    "dark": ("#6cb0ff", "#7d8794", "#ff9e64", "#6ee7a0", "#c9a2ff", "#ff8ac4", "#facc15", "#67e8f9"),
}
Row = Mapping[str, Any]


def newest_record(folder: Path) -> Path:
    """Return the record of the latest date. Raises InputError if there is none."""
    found = sorted(folder.glob("????-??-??-peers-cpu.json"))
    if not found:
        raise InputError(f"{folder}: no record DATE-peers-cpu.json; run make bench-peers and copy its record there")
    return found[-1]


def rendered(record: Mapping[str, Any], name: str) -> dict[str, str]:
    """Return the text of every block by its name."""
    blocks = {"table": table(record, name)}
    for language, words in _WORDS.items():
        blocks[f"chart{language}"] = _PICTURE.format(alt=words["alt"])
        blocks[f"summary{language}"] = f"{summary(record, words['batch'])}\n\n{_machine(record, words)}\n"
    return blocks


def summary(record: Mapping[str, Any], first: str = "batch") -> str:
    """Return the table for README: milliseconds of a decode step, by batch size, precision and runtime."""
    cells = {(point["settings"]["precision"], point["settings"]["requests"]): point for point in record["points"]}
    columns = [
        (precision, runtime)
        for precision in PRECISIONS
        for runtime in _SUMMARY
        # int8 in torch is a demonstration: README shows the runtimes that people serve with.
        if (runtime != "torch" or precision == "fp32")
        and any(_row(point, runtime) for (each, _), point in cells.items() if each == precision)
    ]
    heads = [f"{precision}: {NAMES[runtime]}" for precision, runtime in columns]
    lines = [f"| {first} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for size in sorted({size for _, size in cells}):
        told = [_cell(cells.get((precision, size)), runtime, "step_ms") for precision, runtime in columns]
        lines.append(f"| {size} | {' | '.join(told)} |")
    return "\n".join(lines)


def table(record: Mapping[str, Any], name: str) -> str:
    """Return the table for docs/benchmarks.md: every runtime at every point, and the conditions."""
    lines = [
        f"Record: [{name}](../benchmarks/results/{name}).",
        "",
        "| precision | batch | runtime | prefill, ms | prefill, GOP/s | decode step, ms (95 %) | tokens/s "
        "| bound / step | step / ours | tokens |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for point in _ordered(record):
        precision, size = point["settings"]["precision"], point["settings"]["requests"]
        ours = _row(point, "ort")
        for row in point["rows"]:
            runtime, step = row["target"].split("/")[0], median_of(row, "step_ms")
            start = f"| {precision} | {size} | {NAMES.get(runtime, runtime)} |"
            if row["errors"] or step is None:
                lines.append(f"{start} failed | | | | | | |")
                continue
            low, high = row["intervals_ms"]["step_ms"]
            bound, speed = row["bound_inter_token_ms"], row["roofline"]["prefill"]["flops_per_second"]
            own_step = median_of(ours, "step_ms") if ours is not None else None
            lines.append(
                f"{start} {_cell(point, runtime, 'prefill_ms')} | {speed / 1e9:,.0f} "
                f"| {_cell(point, runtime, 'step_ms')} ({low:.2f} to {high:.2f}) "
                f"| {median_of(row, 'step_tokens_per_second'):,.0f} | {bound / step if bound else 0:.2f} "
                f"| {step / own_step if own_step else 0:.2f} | {_agreement(row, precision, size)} |"
            )
    return "\n".join([*lines, "", *(f"- {line}" for line in conditions(record)), ""])


def conditions(record: Mapping[str, Any]) -> Iterator[str]:
    """Give a sentence for each point: which runtime is ahead, what the machine reached, what disturbed it."""
    for point in _ordered(record):
        session = point["session"]
        bandwidth, rate = (session[name] / 1e9 for name in RATES)
        line = (
            f"{point['point']}: prefill {_ahead(point, 'prefill_ms')}, decode {_ahead(point, 'step_ms')}; "
            f"{bandwidth:.1f} GB/s, {rate:.0f} GFLOP/s by numpy"
        )
        if (session["others_cpu_share"] or 0.0) > _TOLERATED:
            line += f"; DISTURBED: other programs took {session['others_cpu_share']:.0%} of the cores, repeat it"
        failed = [f"{row['target']} failed ({row['errors'][0]})" for row in point["rows"] if row["errors"]]
        yield "; ".join([line, *failed])


def chart(record: Mapping[str, Any], theme: str) -> str:
    """Return an SVG: tokens a second of each runtime relative to the fastest, a panel for each precision."""
    (ink, faint), colours = _INK[theme], _COLOURS[theme]
    runtimes = [name for name in NAMES if any(_row(point, name) for point in record["points"])]
    width, height, left, top = 860, 300, 44, 56
    panel, base = (width - left - 8) / len(PRECISIONS), height - 40
    drawn = [
        f'<text x="{left}" y="18" font-weight="600">Decode speed relative to the fastest runtime, GPT-2 124M</text>'
    ]
    right = float(left)
    for place, name in enumerate(runtimes):
        drawn.append(f'<rect x="{right:.0f}" y="28" width="10" height="10" fill="{colours[place]}"/>')
        drawn.append(f'<text x="{right + 14:.0f}" y="37" font-size="11">{escape(NAMES[name])}</text>')
        right += 30 + 6.2 * len(NAMES[name])
    for level in (0, 50, 100):
        y = base - (base - top) * level / 100
        drawn.append(f'<line x1="{left}" x2="{width - 8}" y1="{y:.1f}" y2="{y:.1f}" stroke="{faint}"/>')
        drawn.append(f'<text x="{left - 6}" y="{y + 4:.1f}" font-size="11" text-anchor="end">{level} %</text>')
    for number, precision in enumerate(PRECISIONS):
        points = [point for point in _ordered(record) if point["settings"]["precision"] == precision]
        for place, point in enumerate(points):
            group = (panel - 24) / len(points)
            start = left + number * panel + 12 + place * group
            bars = _bars(point, runtimes)
            bar = (group - 10) / max(1, len(bars))
            for at, (name, share, tokens) in enumerate(bars):
                x, tall = start + at * bar, (base - top) * share
                note = f"{NAMES[name]}, {point['point']}: {tokens:,.0f} tokens/s"
                drawn.append(
                    f'<rect x="{x:.1f}" y="{base - tall:.1f}" width="{bar * 0.9:.1f}" height="{tall:.1f}" '
                    f'fill="{colours[runtimes.index(name)]}"><title>{escape(note)}</title></rect>'
                )
            middle = start + (group - 10) / 2
            drawn.append(
                f'<text x="{middle:.1f}" y="{base + 15}" font-size="11" text-anchor="middle">'
                f"{point['settings']['requests']}</text>"
            )
        middle = left + (number + 0.5) * panel
        drawn.append(
            f'<text x="{middle:.1f}" y="{base + 32}" font-size="12" text-anchor="middle">{precision}, batch size</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="{ink}" role="img">\n'
        + "\n".join(drawn)
        + "\n</svg>\n"
    )


def _bars(point: Mapping[str, Any], runtimes: Sequence[str]) -> list[tuple[str, float, float]]:
    found = []
    for name in runtimes:
        row = _row(point, name)
        rate = median_of(row, "step_tokens_per_second") if row is not None else None
        if rate is not None:
            found.append((name, rate))
    fastest = max((rate for _, rate in found), default=1.0)
    return [(name, rate / fastest, rate) for name, rate in found]


def _ordered(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    def key(point: Mapping[str, Any]) -> tuple[int, int]:
        return PRECISIONS.index(point["settings"]["precision"]), point["settings"]["requests"]

    return sorted(record["points"], key=key)


def _row(point: Mapping[str, Any] | None, runtime: str) -> Row | None:
    rows = point["rows"] if point is not None else ()
    return next((row for row in rows if row["target"].split("/")[0] == runtime and not row["errors"]), None)


def _cell(point: Mapping[str, Any] | None, runtime: str, figure: str) -> str:
    """A median in ms, bold if no other runtime is better beyond the noise."""
    row = _row(point, runtime)
    value = median_of(row, figure) if row is not None else None
    if point is None or row is None or value is None:
        return ""
    text = f"{value:,.1f}" if value >= 100 or figure == "prefill_ms" else f"{value:.2f}"
    return f"**{text}**" if row["target"] in _best(point, figure) and not _unjudged(point, figure) else text


def _best(point: Mapping[str, Any], figure: str) -> list[str]:
    """The runtime of the best median, and those that are not distinguishable from it."""
    found = point["comparisons"].get(figure)
    if found is not None:
        return [found["best"], *(name for name, each in found["over_best"].items() if each["call"] == SAME)]
    known = {row["target"]: median_of(row, figure) for row in point["rows"] if not row["errors"]}
    measured = {name: value for name, value in known.items() if value is not None}
    return [min(measured, key=lambda name: measured[name])] if measured else []


def _unjudged(point: Mapping[str, Any], figure: str) -> bool:
    """Whether a point was compared in too few rounds. A record without any comparison is described as such."""
    found = point["comparisons"].get(figure)
    return found is not None and any(each["call"] == UNKNOWN for each in found["over_best"].values())


def _ahead(point: Mapping[str, Any], figure: str) -> str:
    best, ours = _best(point, figure), own(point["settings"]["precision"])
    if point["comparisons"].get(figure) is None or _unjudged(point, figure):
        return f"{best[0]} fastest (too few rounds for a verdict)" if best else "not measured"
    return (
        f"{best[0]} ahead"
        if len(best) == 1
        else f"{', '.join(best)} not distinguishable{'' if ours in best else ', ours behind'}"
    )


def _agreement(row: Row, precision: str, size: int) -> str:
    """How many rows have our runtime's greedy tokens."""
    if row["target"] == own(precision):
        return f"`{row['outputs_sha256'][:8]}`"
    differing = row["differing_requests"].get(own(precision), ())
    return "the same" if not differing else f"{size - len(differing)} of {size} rows the same"


def _machine(record: Mapping[str, Any], words: Mapping[str, str]) -> str:
    about, tokens = record["environment"], record["settings"]["prompt_tokens"]
    bold = words["judged" if _has_verdicts(record) else "not_judged"]
    place = {"cpu": about["cpu"], "cores": about["cores"], "date": about["date"][:10]}
    return words["machine"].format(bold=bold, tokens=tokens, **place)


def _has_verdicts(record: Mapping[str, Any]) -> bool:
    return any(point["comparisons"].get("step_ms") for point in record["points"])


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit with code 1 if a page or chart is not up to date.")
@click.option("--root", default=ROOT, type=click.Path(path_type=Path), metavar="FOLDER", help="Work in FOLDER.")
def main(check: bool, root: Path) -> None:
    """Draw the charts and tables of the newest peers record into README.md and docs/."""
    path = newest_record(root / "benchmarks" / "results")
    record = read_record(path)
    blocks = rendered(record, path.name)
    wanted = {root / CHARTS.format(theme=theme): chart(record, theme) for theme in _INK}
    for page in (root / name for name in PAGES if (root / name).exists()):
        text = page.read_text(encoding="utf-8")
        wanted[page] = _BLOCK.sub(lambda match: f"{match[1]}{blocks[match[2]]}{match[3]}", text)
    old = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if check and old:
        names = ", ".join(str(each.relative_to(root)) for each in old)
        raise GPT2BundleError(f"{names}: not what {path.name} gives; run python -m benchmarks.peers.publish")
    for page in old:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(wanted[page], encoding="utf-8")
        click.echo(f"wrote {page.relative_to(root)}")


if __name__ == "__main__":
    run(main)
