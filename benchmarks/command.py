"""`gpt2-bundle bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", "targets", multiple=True, metavar="NAME", help="A graph of the bundle (ort/fp32, "
              "onnx/portable) or savedmodel; repeatable. All of them by default.")  # fmt: skip
@click.option("--batch-size", "batch_sizes", multiple=True, type=click.IntRange(1, 4096), default=(1, 4, 16),
              show_default=True, help="Rows at once; repeatable.")  # fmt: skip
@click.option("--prompt-tokens", type=click.IntRange(1), help="Tokens of each prompt; 128 by default, or what fits.")
@click.option("--new-tokens", type=click.IntRange(1), default=32, show_default=True, help="Decode steps a repeat.")
@click.option("--repeats", type=click.IntRange(1, 1000), default=5, show_default=True, help="Rounds over the targets.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the record as JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print the record as one line of JSON at the end.")
def bench(
    bundle: Path,
    targets: tuple[str, ...],
    output: Path | None,
    as_json: bool,
    prompt_tokens: int | None,
    new_tokens: int,
    **settings: Any,
) -> None:
    """Measure prefill and decode latency of BUNDLE, runtime beside runtime, with the floor of this machine.

    Runs in this process. TensorFlow Serving and GPUs are not measured by this command yet.
    """
    from benchmarks.decode import measure
    from benchmarks.report import print_report
    from benchmarks.targets import load_targets, read_text
    from serving.bundle import open_bundle

    opened = open_bundle(bundle, check="sizes")
    if prompt_tokens is None:
        prompt_tokens = max(1, min(128, opened.manifest.model.n_positions - new_tokens))
    record = measure(
        load_targets(opened, targets),
        opened.manifest.model,
        read_text(opened),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        say=lambda line: click.echo(line, err=True),
        **settings,
    )
    record["bundle"] = opened.manifest.name
    print_report(record)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if as_json:
        click.echo(json.dumps(record))
