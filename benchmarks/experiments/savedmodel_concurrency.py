"""Concurrent plain requests of a SavedModel compared with one request of as many rows, and what streams see of them.

python -m benchmarks.experiments.savedmodel_concurrency BUNDLE/savedmodel/1

Everything runs in this process through TensorFlow's Session API, on random prompts, greedily. `one call` is one
request of all rows; `concurrent` is as many requests of one row, each on a thread of its own, started together. A
stream is a slot that is decoded by calls of one token, alone and next to whole answers that never stop coming.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.common.hardware import environment
from benchmarks.experiments.savedmodel_slots import load, prompts

Call = Callable[..., dict[str, Any]]


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--callers", default="1,8,16", show_default=True, help="Numbers of concurrent requests.")
@click.option("--whole", default=4, show_default=True, help="Whole answers next to a stream.")
@click.option("--prompt", default=128, show_default=True, help="Tokens of each prompt.")
@click.option("--tokens", default=32, show_default=True, help="New tokens of each request.")
@click.option("--rounds", default=3, show_default=True, help="Rounds after one that is not counted; medians are given.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the record as JSON.")
def main(folder: Path, callers: str, whole: int, prompt: int, tokens: int, rounds: int, output: Path | None) -> None:
    """Time concurrent requests, and streams next to them."""
    call = load(folder)
    record: dict[str, Any] = {
        "environment": environment(),
        "settings": {"prompt": prompt, "tokens": tokens, "rounds": rounds},
        "tokens_per_second": {},
    }
    for count in [int(number) for number in callers.split(",")]:
        rates: dict[str, list[float]] = {"one call": [], "concurrent": []}
        for number in range(rounds + 1):
            for name, measure in (("one call", _one_call), ("concurrent", _concurrent)):
                seconds = measure(call, count, prompt, tokens)
                rates[name] += [count * tokens / seconds] if number else []
        record["tokens_per_second"][str(count)] = {name: statistics.median(some) for name, some in rates.items()}
    record["stream_milliseconds"] = {
        "alone": _milliseconds(_stream(call, prompt, tokens)),
        f"next to {whole} whole answers": _milliseconds(_stream_in_company(call, whole, prompt, tokens)),
    }
    text = json.dumps(record, indent=2)
    click.echo(text)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")


def _one_call(call: Call, rows: int, prompt: int, tokens: int) -> float:
    """Seconds of one request of `rows` rows."""
    began = time.perf_counter()
    call("serving_default", **prompts(rows, prompt, tokens))
    return time.perf_counter() - began


def _concurrent(call: Call, count: int, prompt: int, tokens: int) -> float:
    """Seconds until the last of `count` requests of one row has its answer."""
    inputs = prompts(count, prompt, tokens)
    threads = [
        threading.Thread(
            target=call,
            args=("serving_default",),
            kwargs={name: value[row : row + 1] for name, value in inputs.items()},
        )
        for row in range(count)
    ]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


def _stream(call: Call, prompt: int, tokens: int) -> list[float]:
    """Seconds of each call of `decode_slots` for one token."""
    given = call("prefill_slots", request_id=np.array([time.time_ns()], np.int64), **prompts(1, prompt, tokens + 1))
    held = {name: given[name] for name in ("slot", "generation")}
    seconds = []
    for received in range(1, tokens + 1):
        began = time.perf_counter()
        counts = {"received": np.array([received], np.int32), "steps": np.array([1], np.int32)}
        call("decode_slots", **held, **counts)
        seconds.append(time.perf_counter() - began)
    call("release_slots", **held)
    return seconds


def _stream_in_company(call: Call, whole: int, prompt: int, tokens: int) -> list[float]:
    over = threading.Event()

    def answers() -> None:
        while not over.is_set():
            call("serving_default", **prompts(1, prompt, tokens))

    threads = [threading.Thread(target=answers) for _ in range(whole)]
    for thread in threads:
        thread.start()
    try:
        return _stream(call, prompt, tokens)
    finally:
        over.set()
        for thread in threads:
            thread.join()


def _milliseconds(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds) * 1e3, "worst": max(seconds) * 1e3}


if __name__ == "__main__":
    main()
