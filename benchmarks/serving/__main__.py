"""The server compared with its bare engine: python -m benchmarks.serving BUNDLE --graph ort/int8 --output FILE.

`gpt2-bundle serve`, the load generator and the bare engine are three processes that take turns on the same load. The
generator's work on the same cores counts against the server. `--faults` overloads the server instead, leaves it in the
middle of answers and ends it under load. `--soak MINUTES` watches what it holds under mixed use, and ends with 1 if
that grows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from benchmarks.common.hardware import environment
from benchmarks.common.standalone import run
from benchmarks.serving.bare import bare
from benchmarks.serving.faults import disconnects, overload, termination
from benchmarks.serving.server import load, serving
from benchmarks.serving.soak import soak
from serving.bundle import open_bundle
from serving.engine.api import RequestRecord, StepRecord
from serving.engine.config import EngineConfig
from serving.engine.engine import open_engine


class _Silent:
    """An `Observer` of nothing."""

    def on_step(self, record: StepRecord) -> None:
        """Nothing."""

    def on_finish(self, record: RequestRecord) -> None:
        """Nothing."""


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--graph", default="ort/int8", show_default=True, help="Graph that is served.")
@click.option("--clients", default="1,16", show_default=True, help="Numbers of streaming clients.")
@click.option("--seconds", default=10.0, show_default=True, help="Length of each round.")
@click.option("--repeats", default=2, show_default=True, help="Number of rounds.")
@click.option("--prompt-tokens", default=64, show_default=True, help="Length of each prompt.")
@click.option("--new-tokens", default=96, show_default=True, help="New tokens of each request.")
@click.option("--faults", is_flag=True, help="Overload, disconnects and SIGTERM instead of the comparison.")
@click.option("--overload-seconds", default=60.0, show_default=True, help="Length of the overload.")
@click.option(
    "--soak", "soak_minutes", type=click.FloatRange(2), metavar="MINUTES", help="Mixed use for so long instead."
)
@click.option("--soak-rate", default=4.0, show_default=True, help="Requests a second of the soak.")
@click.option("--soak-bound", default=16.0, show_default=True, help="MiB an hour by which memory may grow at most.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the record as JSON.")
def main(
    bundle: Path,
    graph: str,
    clients: str,
    seconds: float,
    repeats: int,
    prompt_tokens: int,
    new_tokens: int,
    faults: bool,
    overload_seconds: float,
    soak_minutes: float | None,
    soak_rate: float,
    soak_bound: float,
    output: Path | None,
) -> None:
    """Measure on the folder BUNDLE."""
    opened = open_bundle(bundle, check="sizes")
    record: dict[str, Any] = {"environment": environment(), "graph": graph, "prompt_tokens": prompt_tokens}
    record |= {"new_tokens": new_tokens}
    sizes = ["--prompt-tokens", str(prompt_tokens), "--new-tokens", str(new_tokens)]
    if soak_minutes is not None:
        model, context = opened.manifest.name, opened.manifest.model.n_positions
        with serving(bundle, graph) as server:
            record["soak"] = soak(server, model, context, soak_minutes, soak_rate, soak_bound)
    elif faults:
        with serving(bundle, graph, "--queue", "16") as server:
            record["overload"] = overload(server, sizes, seconds, overload_seconds)
            record["disconnects"] = disconnects(server)
            record["termination"] = termination(server, sizes)
    else:
        record["rounds"] = []
        engine = open_engine(opened, graph, "cpu", EngineConfig(), _Silent())
        with serving(bundle, graph) as server:
            for repeat in range(repeats + 1):
                for count in map(int, clients.split(",")):
                    length = seconds if repeat else 2.0
                    pair = {
                        "clients": count,
                        "engine": bare(engine, count, length, prompt_tokens, new_tokens, repeat),
                        "server": load(
                            server.url,
                            ["--clients", str(count), "--seconds", str(length), "--seed", str(repeat), *sizes],
                        ),
                    }
                    if repeat:  # The first round warms up.
                        record["rounds"].append(pair)
                        click.echo(json.dumps(pair), err=True)
        engine.close()
    text = json.dumps(record, indent=1)
    if output is None:
        click.echo(text)
    else:
        output.write_text(text + "\n", encoding="utf-8")
    if found := record.get("soak", {}).get("faults"):
        raise SystemExit("\n".join(["the soak found:", *found]))


if __name__ == "__main__":
    run(main)
