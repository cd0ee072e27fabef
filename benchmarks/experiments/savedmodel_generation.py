"""`serving_default` compared with KerasHub's compiled generation.

python -m benchmarks.experiments.savedmodel_generation BUNDLE/savedmodel/1

Both make the same number of tokens from prompts of one length, greedily, in turns; KerasHub in a process of its own,
which idles meanwhile, compiled by XLA (its default) and by tf.function alone. A token is the difference between calls
for many tokens and for one, divided by how many more; the whole call has the prompt in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click

from benchmarks.common.hardware import BandwidthProbe, environment
from benchmarks.experiments.savedmodel_slots import load, prompts

ROOT = Path(__file__).parents[2]
KINDS = {"KerasHub, XLA": True, "KerasHub, tf.function": False}


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--peers", required=True, type=click.Path(exists=True, path_type=Path), metavar="PYTHON",
              help="The Python of an environment with KerasHub.")  # fmt: skip
@click.option("--batch", default="1,4,16", show_default=True, help="Batch sizes.")
@click.option("--prompt", default=128, show_default=True, help="Tokens of each prompt.")
@click.option("--tokens", default=64, show_default=True, help="Tokens made after the first.")
@click.option("--rounds", default=3, show_default=True, help="Rounds behind the one that compiles.")
@click.option("--threads", default="0,0", show_default=True, metavar="INTRA,INTER",
              help="Ours: threads of an op, ops at once; 1,2 for a SavedModel with export.matmul_parts=2.")  # fmt: skip
@click.option("--kind", "kinds", multiple=True, type=click.Choice([*KINDS]), help="KerasHub how; default both.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Add to a record of JSON.")
def main(
    folder: Path,
    peers: Path,
    batch: str,
    prompt: int,
    tokens: int,
    rounds: int,
    threads: str,
    kinds: tuple[str, ...],
    output: Path | None,
) -> None:
    """Time whole generations beside KerasHub's."""
    intra, inter = (int(number) for number in threads.split(","))
    call = load(folder, intra, inter)
    probe = BandwidthProbe()
    environ = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [str(peers.absolute()), "-m", "benchmarks.experiments.keras_hub_generation"]
    cases: list[dict[str, Any]] = []
    with subprocess.Popen(
        command, env=environ, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    ) as child:  # fmt: skip

        def ask(job: dict[str, Any] | None) -> dict[str, Any]:
            assert child.stdin is not None and child.stdout is not None
            if job is not None:
                print(json.dumps(job), file=child.stdin, flush=True)
            line = child.stdout.readline()
            if not line:
                raise click.ClickException("the KerasHub process ended; run it by hand to see why")
            answer: dict[str, Any] = json.loads(line)
            return answer

        versions = ask(None)["versions"]
        for kind in kinds or tuple(KINDS):
            for size in [int(number) for number in batch.split(",")]:
                times: dict[str, dict[int, list[float]]] = {
                    name: {1: [], 1 + tokens: []} for name in ("gpt2-bundle", kind)
                }
                for number in range(rounds + 1):
                    for count in (1, 1 + tokens):
                        ours = _ours(call, prompts(size, prompt, count), count)
                        theirs = ask({"batch": size, "prompt": prompt, "tokens": count, "xla": KINDS[kind]})["seconds"]
                        if number:
                            times["gpt2-bundle"][count].append(ours)
                            times[kind][count].append(theirs)
                cases.append({"batch": size, "beside": kind, "threads": threads} | summary(times, tokens))
                probe.sample()
                click.echo(json.dumps(cases[-1]))
    record: dict[str, Any] = {"environment": environment(), "peer_versions": versions, "prompt": prompt}
    record |= {"tokens": tokens, "rounds": rounds, "read_bandwidth": max(probe.samples), "cases": cases}
    if output is not None:
        if output.exists():
            record["cases"] = json.loads(output.read_text(encoding="utf-8"))["cases"] + cases
        output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _ours(call: Callable[..., dict[str, Any]], inputs: dict[str, Any], tokens: int) -> float:
    began = time.perf_counter()
    made = call("serving_default", **inputs)["lengths"]
    seconds = time.perf_counter() - began
    if (made != tokens).any():
        raise click.ClickException("the model ended a text by itself; its time would be of fewer tokens")
    return seconds


def summary(times: dict[str, dict[int, list[float]]], tokens: int) -> dict[str, Any]:
    """Milliseconds of whole calls and of a token, by medians, and how many times as long the other takes."""
    calls = {name: 1e3 * median(some[1 + tokens]) for name, some in times.items()}
    steps = {name: 1e3 * (median(some[1 + tokens]) - median(some[1])) / tokens for name, some in times.items()}
    ours, other = times
    return {
        "ms_call": calls,
        "ms_token": steps,
        "call_ratio": calls[other] / calls[ours],
        "token_ratio": steps[other] / steps[ours],
        "samples": times,
    }


if __name__ == "__main__":
    main()
