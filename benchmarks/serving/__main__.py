"""The server compared with its bare engine: python -m benchmarks.serving BUNDLE --graph ort/int8 --output FILE.

`gpt2-bundle serve`, the load generator and the bare engine are three processes that take turns on the same load. The
generator's work on the same cores counts against the server. `--faults` overloads the server instead, leaves it in the
middle of answers and ends it under load. `--soak MINUTES` watches what it holds under mixed use, and ends with 1 if
that grows.
"""

from __future__ import annotations

import json
from typing import Any

import click

from benchmarks.common.own_server import OwnServer
from benchmarks.common.standalone import measurement, numbers_of, run, say
from benchmarks.serving.engine import Observer, bare
from benchmarks.serving.faults import disconnects, overload, termination
from benchmarks.serving.load import load
from benchmarks.serving.soak import soak
from serving.bundle import Bundle
from serving.engine.config import EngineConfig
from serving.engine.engine import open_engine
from serving.errors import GPT2BundleError


def _told(record: dict[str, Any]) -> str:
    """The record. Raises GPT2BundleError with what the soak found."""
    text = json.dumps(record, indent=1)
    if faults := record.get("soak", {}).get("faults"):
        click.echo(text)
        raise GPT2BundleError("; ".join(["the soak found", *faults]))
    return text


@measurement(
    click.option("--faults", is_flag=True, help="Overload, disconnects and SIGTERM instead of the comparison."),
    click.option("--overload-seconds", default=60.0, show_default=True, help="Length of the overload."),
    click.option(
        "--soak", "soak_minutes", type=click.FloatRange(2), metavar="MINUTES", help="Mixed use for so long instead."
    ),
    click.option("--soak-rate", default=4.0, show_default=True, help="Requests a second of the soak."),
    click.option("--soak-bound", default=16.0, show_default=True, help="MiB an hour by which memory may grow at most."),
    table=_told, clients="1,16", seconds=10.0, repeats=2, prompt_tokens=64, new_tokens=96,
)  # fmt: skip
def main(bundle: Bundle, graph: str, **given: Any) -> dict[str, Any]:
    """Measure on the folder BUNDLE."""
    sizes = {name: given[name] for name in ("prompt_tokens", "new_tokens")}
    if given["soak_minutes"] is not None:
        with OwnServer(bundle.folder, graph) as server:
            limits = given["soak_minutes"], given["soak_rate"], given["soak_bound"]
            return {"soak": soak(server, bundle.manifest.name, bundle.manifest.model.n_positions, *limits)}
    if given["faults"]:
        with OwnServer(bundle.folder, graph, "--queue", "16") as server:
            return {
                "overload": overload(server, sizes, given["seconds"], given["overload_seconds"]),
                "disconnects": disconnects(server),
                "termination": termination(server, sizes),
            }
    rounds: list[dict[str, Any]] = []
    engine = open_engine(bundle, graph, "cpu", EngineConfig(speculation="off"), Observer(kept=False))
    with OwnServer(bundle.folder, graph) as server:
        for repeat in range(given["repeats"] + 1):
            for count in numbers_of(given["clients"]):
                asked = {"clients": count, "seconds": given["seconds"] if repeat else 2.0, "seed": repeat, **sizes}
                pair = {"clients": count, "engine": bare(engine, **asked), "server": load(server.url, **asked)}
                if repeat:  # The first round warms up.
                    rounds.append(pair)
                    say(pair)
    engine.close()
    return {"rounds": rounds}


if __name__ == "__main__":
    run(main)
