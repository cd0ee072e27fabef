"""`gpt2-bundle batch` compared with the server at 16 clients: python -m benchmarks.serving.batch BUNDLE --output FILE.

Both take turns on requests of the same sizes. The batch's rate is that between its first and its last answer, so
loading is not in it, and the last requests, which end alone, are.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import click

from benchmarks.common.hardware import environment
from benchmarks.common.standalone import run
from benchmarks.serving.load import draw_prompt
from benchmarks.serving.server import load, serving

_BATCH = [sys.executable, "-c", "from serving.cli import main; main()", "batch"]
_LOOK = 0.02


def answered(bundle: Path, graph: str, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """Answer `bodies` as a batch: seconds between its first and last answer, tokens a second between them, errors."""
    with tempfile.TemporaryDirectory() as folder:
        requests, answers = Path(folder, "in.jsonl"), Path(folder, "out.jsonl")
        with requests.open("w", encoding="utf-8") as file:
            for number, body in enumerate(bodies):
                line = {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}
                file.write(json.dumps(line) + "\n")
        process = subprocess.Popen([*_BATCH, str(bundle), str(requests), str(answers), "--graph", graph])
        first = last = size = early = 0.0
        while process.poll() is None or size != answers.stat().st_size:
            time.sleep(_LOOK)
            found = answers.stat().st_size if answers.exists() else 0
            if found != size:
                size, last = found, time.perf_counter()
                if not first:
                    first, early = last, found
        data = answers.read_bytes()
        whole = [json.loads(line) for line in data.splitlines()]
        before = [json.loads(line) for line in data[: int(early)].splitlines(keepends=True) if line.endswith(b"\n")]
    tokens = _tokens(whole) - _tokens(before)
    seconds = last - first
    errors = sum(answer["error"] is not None or answer["response"]["status_code"] != 200 for answer in whole)
    return {"seconds": seconds, "tokens_per_second": tokens / seconds if seconds else None, "errors": errors}


def _tokens(answers: list[dict[str, Any]]) -> int:
    bodies = (answer["response"]["body"] for answer in answers if answer["response"])
    return sum(body["usage"]["completion_tokens"] for body in bodies if "usage" in body)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--graph", default="ort/int8", show_default=True, help="Graph that answers.")
@click.option("--requests", default=256, show_default=True, help="Number of requests of each batch.")
@click.option("--seconds", default=20.0, show_default=True, help="Length of each round of the server.")
@click.option("--repeats", default=3, show_default=True, help="Number of rounds.")
@click.option("--prompt-tokens", default=64, show_default=True, help="Length of each prompt.")
@click.option("--new-tokens", default=96, show_default=True, help="New tokens of each request.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the record as JSON.")
def main(
    bundle: Path,
    graph: str,
    requests: int,
    seconds: float,
    repeats: int,
    prompt_tokens: int,
    new_tokens: int,
    output: Path | None,
) -> None:
    """Measure on the folder BUNDLE."""
    sizes = ["--prompt-tokens", str(prompt_tokens), "--new-tokens", str(new_tokens)]
    rounds = []
    for repeat in range(repeats):
        draw = random.Random(repeat)
        # What the load generator asks for, but for the stream.
        fields = {"max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "logprobs": 0}
        bodies = [{"prompt": draw_prompt(draw, prompt_tokens, False), **fields} for _ in range(requests)]
        done: dict[str, Any] = {"batch": answered(bundle, graph, bodies)}
        with serving(bundle, graph) as server:
            load(server.url, ["--clients", "16", "--seconds", "2", *sizes])
            options = ["--clients", "16", "--seconds", str(seconds), "--seed", str(repeat + 1), *sizes]
            done["server"] = load(server.url, options)
        rounds.append(done)
        click.echo(json.dumps(done), err=True)
    rates = {name: median([done[name]["tokens_per_second"] for done in rounds]) for name in ("batch", "server")}
    record = {
        "environment": environment(),
        "graph": graph,
        "requests": requests,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "tokens_per_second": rates,
        "batch_over_server": rates["batch"] / rates["server"],
    }
    text = json.dumps(record, indent=1)
    if output is None:
        click.echo(text)
    else:
        output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
