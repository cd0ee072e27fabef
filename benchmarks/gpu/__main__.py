"""`python -m benchmarks.gpu`: the contests on one device, in one record that a later call goes on with."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from benchmarks.common.hardware import environment
from benchmarks.common.standalone import run
from benchmarks.gpu.contestants import CONTESTANTS
from benchmarks.gpu.device import describe, measure_rates
from benchmarks.gpu.suite import Setting, Suite
from serving.bundle import open_bundle
from serving.errors import GPT2BundleError, InputError

_BATCH_SIZES = "1,4,16,64,128,256"


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), metavar="FILE",
              help="The record, as JSON; contests that it holds are not run again.")  # fmt: skip
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True,
              help="cpu is a rehearsal.")  # fmt: skip
@click.option("--quick", is_flag=True, help="16 + 8 tokens, 1 repeat: shows that it runs, not how fast.")
@click.option("--batch-sizes", default=_BATCH_SIZES, show_default=True, metavar="N,N,...", help="Rows at once.")
@click.option("--contestants", metavar="NAME,NAME,...", help=f"Of: {', '.join(CONTESTANTS)}; all by default.")
@click.option("--seconds", type=click.FloatRange(0), default=540, show_default=True,
              help="The budget; what it has no room for is listed as skipped.")  # fmt: skip
def main(
    bundle: Path,
    output: Path,
    device: str,
    quick: bool,
    batch_sizes: str,
    contestants: str | None,
    seconds: float,
) -> None:
    """Measure BUNDLE on a GPU in ONNX Runtime, TensorFlow, TensorFlow Serving and torch."""
    opened = open_bundle(bundle, check="sizes")
    sizes = _sizes(batch_sizes)
    names = list(CONTESTANTS) if contestants is None else contestants.split(",")
    for name in names:
        if name not in CONTESTANTS:
            raise InputError(f"no contestant {name!r}; there are {', '.join(CONTESTANTS)}")
    setting = Setting(16, 8, 1, device) if quick else Setting(128, 64, 3, device)
    if setting.prompt_tokens + setting.new_tokens + 1 > opened.manifest.model.n_positions:
        raise InputError(f"the context of {opened.manifest.model.n_positions} tokens is too short")
    about = {"bundle": opened.manifest.name, "model": vars(opened.manifest.model), "setting": vars(setting)}
    record: dict[str, Any] = {**about, "sessions": [], "rates": None, "contests": [], "skipped": []}
    if output.exists():
        record = _read(output)
        differing = [key for key, value in json.loads(json.dumps(about)).items() if record.get(key) != value]
        if differing:
            raise InputError(f"{output} is of another {' and '.join(differing)}; name another file")
    output.parent.mkdir(parents=True, exist_ok=True)
    record["sessions"].append({"command": sys.argv[1:], "gpu": describe(device), **environment()})
    record["rates"] = record["rates"] or measure_rates(device)

    def keep() -> None:
        draft = output.with_name(f"{output.name}.unfinished")
        draft.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        draft.replace(output)

    suite = Suite(opened, setting, record, output.parent / "logs", seconds, keep, click.echo)
    suite.hold([CONTESTANTS[name] for name in CONTESTANTS if name in names], sizes)
    click.echo(table(record))
    if record["contests"] and not any("decode_ms" in contest for contest in record["contests"]):
        raise GPT2BundleError(f"nothing was measured on {device}; the table says why")


def _read(path: Path) -> dict[str, Any]:
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a record ({error}); name another file") from None
    if not isinstance(record, dict):
        raise InputError(f"{path}: is no record; name another file")
    return record


def table(record: dict[str, Any]) -> str:
    """The record's figures as a Markdown table."""
    lines = [
        "| contestant | batch | decode, ms a step | tokens/s | prefill, ms | floor, ms | GPU memory, GiB "
        "| tokens as the first |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for contest in record["contests"]:
        place = f"| {contest['contestant']} | {contest['batch_size']} |"
        if "error" in contest:
            lines.append(f"{place} {contest['error'].replace('|', '/')} | | | | | |")
            continue
        decode, prefill = contest["decode_ms"], contest["prefill_ms"]
        figures = (
            decode and decode["median"], contest["decode_tokens_per_second"], prefill and prefill["median"],
            contest["floor_ms"],
        )  # fmt: skip
        told = " | ".join("" if figure is None else f"{figure:,.3f}" for figure in figures)
        memory = contest["gpu_memory_bytes"]
        held = "" if memory["peak"] is None else f"{memory['peak'] / 2**30:.2f}{' *' if memory['whole_gpu'] else ''}"
        lines.append(f"{place} {told} | {held} | {'yes' if contest['tokens_as_first'] else 'no'} |")
    lines += [f"| {each['contestant']} | {each['batch_size']} | skipped | | | | | |" for each in record["skipped"]]
    lines += ["", *(f"- {name}: {note}" for name, note in notes(record))]
    return "\n".join(lines)


def notes(record: dict[str, Any]) -> list[tuple[str, str]]:
    """What a reader must know of contestants, once each."""
    found: dict[tuple[str, str], None] = {}
    for contest in record["contests"]:
        found |= {(contest["contestant"], note): None for note in contest.get("notes", ())}
        if contest.get("gpu_memory_bytes", {}).get("peak") is not None and contest["gpu_memory_bytes"]["whole_gpu"]:
            found["*", "what the whole GPU had in use beyond the beginning"] = None
    return list(found)


def _sizes(text: str) -> list[int]:
    sizes = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if not all(1 <= size <= 4096 for size in sizes):
        raise InputError(f"--batch-sizes {text!r}: must be numbers of 1 to 4096 with commas between")
    return sizes


if __name__ == "__main__":
    run(main)
