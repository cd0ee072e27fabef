"""`python -m benchmarks.peers`: the bundle's graphs and other runtimes, on the CPU or on a GPU."""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.common.held_out_text import read_text
from benchmarks.common.standalone import run
from benchmarks.peers.comparison import Comparison, Settings, new_record
from benchmarks.peers.device_rates import measure_rates
from benchmarks.peers.runtimes import CPU, GPU, PRECISIONS, SPECULATION, chosen
from benchmarks.suite.machine.meters import open_meters
from benchmarks.suite.record import SCHEMA, about, read_record, write_reports
from benchmarks.suite.report.markdown import to_markdown, verdict
from serving.bundle import open_bundle
from serving.errors import GPT2BundleError, InputError


# fmt: off
@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
              help="Measure on the CPU, runtimes in turns, or on a GPU, one runtime after the other.")
@click.option("--rehearse", is_flag=True, help="Measure the GPU's runtimes on the CPU, one after the other.")
@click.option("--speculation", is_flag=True,
              help="Measure speculative and plain decoding of this project and peers at batch 1, on a trained bundle.")
@click.option("--environments", default=".", show_default=True, type=click.Path(path_type=Path), metavar="FOLDER",
              help="Look for the peer environments .venv-peer-NAME in FOLDER; peers without one are left out.")
@click.option("--runtime", "names", multiple=True, metavar="NAME",
              help="Measure this runtime only, such as openvino or openvino/int8; repeatable.")
@click.option("--precision", "precisions", multiple=True, type=click.Choice((*PRECISIONS, "fp16")),
              help="Measure this precision only; repeatable.")
@click.option("--batch-size", "batch_sizes", multiple=True, type=click.IntRange(1, 4096),
              help="Number of rows; repeatable.  [default: 1, 4, 16, 64; on a GPU also 128, 256]")
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True,
              help="Length of each prompt.")
@click.option("--new-tokens", type=click.IntRange(1), default=32, show_default=True,
              help="Number of decode steps in a round.")
@click.option("--repeats", type=click.IntRange(1, 1000), default=5, show_default=True,
              help="Number of rounds; verdicts need five.")
@click.option("--seconds", type=click.FloatRange(0),
              help="Skip what this time has no room for.  [default: no limit; on a GPU 540]")
@click.option("--work", default="runs/bench-peers", show_default=True, type=click.Path(path_type=Path),
              metavar="FOLDER", help="Keep converted models and logs in FOLDER.")
@click.option("--output", type=click.Path(path_type=Path), required=True, metavar="FILE",
              help="Write the record to FILE; its points of other batch sizes and precisions stay.")
@click.option("--resume", is_flag=True, help="Leave out what the record in --output already has.")
def main(
    bundle: Path, device: str, rehearse: bool, speculation: bool, environments: Path, names: tuple[str, ...],
    precisions: tuple[str, ...], batch_sizes: tuple[int, ...], prompt_tokens: int, new_tokens: int, repeats: int,
    seconds: float | None, work: Path, output: Path, resume: bool,
) -> None:
    """Measure prefill and decode of static batches of BUNDLE and of other runtimes."""
    opened = open_bundle(bundle, check="sizes")
    if prompt_tokens + new_tokens + 1 > opened.manifest.model.n_positions:
        raise InputError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones do not fit a context of "
            f"{opened.manifest.model.n_positions}; lower --prompt-tokens or --new-tokens"
        )
    on_gpu = device != "cpu"
    alone = on_gpu or rehearse
    if speculation and (alone or batch_sizes not in ((), (1,))):
        raise InputError("--speculation measures on the CPU at batch 1; leave the other options out")
    known = GPU if alone else SPECULATION if speculation else CPU
    runtimes = [each for each in chosen(known, names) if not precisions or each.precision in precisions]
    if not runtimes:
        raise InputError(f"no such runtime; there are {', '.join(each.name for each in known)}")
    installed = [each for each in runtimes if each.is_installed(environments)]
    seconds = 540.0 if on_gpu and seconds is None else seconds
    settings = Settings(prompt_tokens, new_tokens, repeats, device, alone, seconds)
    record = new_record(about(opened), settings, SCHEMA)
    if output.exists():
        record = read_record(output)
        lengths = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        if any(record[key] != value for key, value in about(opened).items()) or not (
            lengths.items() <= record["settings"].items()
        ):
            raise InputError(f"{output} is of another bundle or other lengths; name another file")
    record["not_measured"] = {
        each.name: f"its environment .venv-peer-{each.environment} is not in {environments}"
        for each in runtimes if each not in installed
    }
    meters, rates = open_meters(), measure_rates(device) if alone else None
    record |= {"energy": meters.describe(), "gpu": (rates or {}).get("gpu")}
    output.parent.mkdir(parents=True, exist_ok=True)
    done = {(row["target"], point["settings"]["requests"]) for point in record["points"] for row in point["rows"]
            if not row["errors"]} if resume else set()
    comparison = Comparison(
        opened, read_text(opened), settings, record, environments=environments, work=work, rates=rates, meters=meters,
        keep=lambda: write_reports(record, output), say=lambda line: click.echo(line, err=True),
    )
    sizes = batch_sizes or ((1,) if speculation else (1, 4, 16, 64, 128, 256) if on_gpu else (1, 4, 16, 64))
    if alone:
        for runtime in installed:
            if left := [size for size in sizes if (runtime.name, size) not in done]:
                comparison.run([runtime], left)
    else:
        for size in sizes:
            # A point is whole or not there: its runtimes took turns.
            missing = {each.precision for each in installed if (each.name, size) not in done}
            comparison.run([each for each in installed if each.precision in missing], [size])
    write_reports(record, output)
    click.echo(to_markdown(record))
    click.echo("\n".join(verdict(record)))
    if not any(row["figures"].get("prefill_ms") for point in record["points"] for row in point["rows"]):
        raise GPT2BundleError(f"nothing was measured on {device}; the table says why")


if __name__ == "__main__":
    run(main)
