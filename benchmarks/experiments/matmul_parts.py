"""Whole matrices compared with matrices in parts.

python -m benchmarks.experiments.matmul_parts WHOLE/savedmodel/1 PARTS/savedmodel/1

Each is run by `serving_default` with TensorFlow's own thread pools and with one thread an op and as many ops at once as
there are cores, which are settings of a process: so four processes take turns, and the others idle. Prompts and the
time of a token are those of benchmarks.experiments.savedmodel_generation.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import click

from benchmarks.common.hardware import BandwidthProbe, environment, usable_cores
from benchmarks.experiments.savedmodel_slots import load, prompts

ROOT = Path(__file__).parents[2]


@click.command()
@click.argument("whole", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("parts", type=click.Path(exists=True, file_okay=False, path_type=Path), required=False)
@click.option("--batch", default="1,4,16", show_default=True, help="Batch sizes.")
@click.option("--prompt", default=128, show_default=True, help="Tokens of each prompt.")
@click.option("--tokens", default=32, show_default=True, help="Tokens made after the first.")
@click.option("--rounds", default=3, show_default=True, help="Rounds behind the first.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the record as JSON.")
@click.option("--answer", hidden=True, metavar="INTRA,INTER", help="Run one contestant, told what to do by its input.")
def main(
    whole: Path,
    parts: Path | None,
    batch: str,
    prompt: int,
    tokens: int,
    rounds: int,
    output: Path | None,
    answer: str | None,
) -> None:
    """Time generation with whole matrices and with parts, each with two settings of the thread pools."""
    if answer is not None:
        _answer(whole, answer)
        return
    if parts is None:
        raise click.UsageError("name two SavedModels: one with whole matrices, one with parts")
    pools = {"usual threads": "0,0", "one thread an op": f"1,{usable_cores()}"}
    probe = BandwidthProbe()
    cases: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        children = {
            f"{name}, {pool}": stack.enter_context(_start(folder, threads))
            for name, folder in (("whole", whole), ("parts", parts))
            for pool, threads in pools.items()
        }
        for size in [int(number) for number in batch.split(",")]:
            times: dict[str, dict[int, list[float]]] = {name: {1: [], 1 + tokens: []} for name in children}
            for number in range(rounds + 1):
                for name, child in children.items():
                    for count in (1, 1 + tokens):
                        seconds = _ask(child, {"rows": size, "prompt": prompt, "tokens": count})
                        if number:
                            times[name][count].append(seconds)
            probe.sample()
            first = {name: 1e3 * median(some[1]) for name, some in times.items()}
            later = {name: 1e3 * (median(some[1 + tokens]) - median(some[1])) / tokens for name, some in times.items()}
            cases.append({"batch": size, "ms_token": later, "ms_first_token": first, "samples": times})
            click.echo(json.dumps({key: value for key, value in cases[-1].items() if key != "samples"}))
    record = {"environment": environment(), "prompt": prompt, "tokens": tokens, "rounds": rounds}
    record |= {"read_bandwidth": max(probe.samples), "cases": cases}
    if output is not None:
        output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _start(folder: Path, threads: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.experiments.matmul_parts", str(folder.absolute()), "--answer", threads]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.Popen(
        command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def _ask(child: subprocess.Popen[str], job: dict[str, int]) -> float:
    assert child.stdin is not None and child.stdout is not None
    print(json.dumps(job), file=child.stdin, flush=True)
    line = child.stdout.readline()
    if not line:
        raise click.ClickException("a contestant ended; run it by hand to see why")
    return float(line)


def _answer(folder: Path, threads: str) -> None:
    intra, inter = (int(number) for number in threads.split(","))
    call = load(folder, intra, inter)
    for line in sys.stdin:
        inputs = prompts(**json.loads(line))
        began = time.perf_counter()
        call("serving_default", **inputs)
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
