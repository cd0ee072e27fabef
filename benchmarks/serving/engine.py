"""The engine beside the bare loop: python -m benchmarks.serving.engine BUNDLE --graph ort/int8 --streams 16.

Both run in this process on the same prompts, greedily, in turns. `loop` is a decode step of `serving.generation` and
the choice of its tokens; `engine` is what lies between two tokens of one stream while all streams decode. Then a long
prompt arrives while the streams run, and the time between tokens is measured until it has been read. At last each
stream asks anew whenever its text is complete, which shows what reading prompts beside others costs all in all.
"""

from __future__ import annotations

import functools
import itertools
import json
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.common.hardware import environment
from benchmarks.common.held_out_text import cut_prompts, read_text
from benchmarks.common.standalone import run
from benchmarks.common.statistics import summarise
from benchmarks.serving.bare import bare
from serving.backends.base import Backend
from serving.backends.loader import load_backend
from serving.bundle import open_bundle
from serving.engine.api import Event, FinishEvent, GenerationRequest, RequestRecord, StepRecord, TokenEvent
from serving.engine.config import EngineConfig
from serving.engine.engine import SlotEngine, open_engine
from serving.errors import ParityError
from serving.generation.token_selection import Chooser, HostSteps
from serving.sampling import SamplingParams


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--graph", default="ort/fp32", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--streams", default="1,4,16", show_default=True, help="Numbers of streams.")
@click.option("--prompt-tokens", default=128, show_default=True)
@click.option("--new-tokens", default=48, show_default=True)
@click.option("--long-prompt", default=900, show_default=True, help="Tokens of the prompt that arrives; 0 is none.")
@click.option("--seconds", default=5, show_default=True, help="Of streams that ask again and again; 0 is none.")
@click.option("--max-length", type=int, help="Positions of a slot; the model's context by default.")
@click.option(
    "--chunks",
    default=f"{EngineConfig().prefill_slowdown}x",
    show_default=True,
    help="What to compare: tokens beside a step (16), or how much slower a step may be (2.5x).",
)
@click.option("--repeats", default=3, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the record as JSON.")
def main(
    bundle: Path,
    graph: str,
    device: str,
    streams: str,
    chunks: str,
    max_length: int | None,
    output: Path | None,
    **sizes: int,
) -> None:
    """Measure on the folder BUNDLE."""
    opened = open_bundle(bundle, check="sizes")
    text = read_text(opened)
    loop = load_backend(opened, "onnx", graph, device)
    record: dict[str, Any] = {"environment": environment(), "graph": graph, "device": device, "max_length": max_length}
    record |= sizes
    record |= {"decode": [], "arrival": [], "closed": []}
    long_prompt, seconds = sizes.pop("long_prompt"), sizes.pop("seconds")
    counts = [int(count) for count in streams.split(",")]
    for number, chunk in enumerate(chunks.split(",")):
        observer = Observer()
        fresh = itertools.count()
        pace: dict[str, Any] = {"prefill_chunk": int(chunk)} if chunk.isdigit() else {}
        config = EngineConfig(max_length=max_length, **pace or {"prefill_slowdown": float(chunk.removesuffix("x"))})
        engine = open_engine(opened, graph, device, config, observer)
        for count in counts:
            # A chunk makes no difference to a step that reads no prompt.
            if not number:
                prompt = cut_prompts(text, 1, sizes["prompt_tokens"])[0]
                record["decode"].append({"streams": count, **_decode(loop, engine, observer, prompt, count, sizes)})
                click.echo(json.dumps(record["decode"][-1]), err=True)
            if long_prompt:
                # All slots but the one that the long prompt needs.
                prompts = cut_prompts(text, min(count, engine.stats().slots - 1), sizes["prompt_tokens"])
                late = cut_prompts(text, 1, long_prompt)[0]
                runs = []
                for _ in range(sizes["repeats"]):
                    # Another first token each time, so that nothing of it is in the cache.
                    late[0] = next(fresh)
                    runs.append(_arrival(engine, observer, prompts, late))
                ratio = float(np.median([run["p99_over_quiet_median"] for run in runs]))
                row = {"prefill_chunk": chunk, "streams": len(prompts), "p99_over_quiet_median": ratio, "runs": runs}
                record["arrival"].append(row)
                click.echo(json.dumps(row), err=True)
            if seconds:
                figures = bare(engine, count, seconds, sizes["prompt_tokens"], sizes["new_tokens"], count)
                record["closed"].append({"prefill_chunk": chunk, "streams": count, **figures})
                click.echo(json.dumps(record["closed"][-1]), err=True)
        engine.close()
    text_record = json.dumps(record, indent=2)
    click.echo(text_record)
    if output is not None:
        output.write_text(text_record + "\n", encoding="utf-8")


class Observer:
    """Keeps all steps since it was last emptied."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []

    def on_step(self, record: StepRecord) -> None:
        """See `serving.engine.api.Observer`."""
        self.steps.append(record)

    def on_finish(self, record: RequestRecord) -> None:
        """See `serving.engine.api.Observer`."""


class Batch:
    """Requests that run at once; `tokens` of each as they come."""

    def __init__(self, engine: SlotEngine, prompts: list[list[int]], count: int, n: int = 1) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(len(prompts) * n)]
        self.begun = threading.Semaphore(0)
        self._ended = threading.Semaphore(0)
        params = SamplingParams(max_new_tokens=count, ignore_eos=True)
        self.handles = [
            engine.submit(GenerationRequest(tuple(prompt), params, n), functools.partial(self._hear, row * n))
            for row, prompt in enumerate(prompts)
        ]

    def _hear(self, row: int, event: Event) -> None:
        if isinstance(event, TokenEvent):
            row += event.index
            self.tokens[row].append(event.token_id)
            if len(self.tokens[row]) == 1:
                self.begun.release()
        elif isinstance(event, FinishEvent):
            self._ended.release()

    def wait(self, semaphore: threading.Semaphore | None = None) -> None:
        """Until all have ended, or until `semaphore` was released once for each."""
        for _ in self.tokens:
            (semaphore or self._ended).acquire()


def _decode(
    loop: Backend, engine: SlotEngine, observer: Observer, prompt: list[int], streams: int, sizes: dict[str, int]
) -> dict[str, Any]:
    """Milliseconds between tokens in the loop and in the engine, in turns; all rows begin and end at once."""
    prompts = [prompt] * streams
    loop_ms: list[float] = []
    engine_ms: list[float] = []
    for repeat in range(sizes["repeats"] + 1):
        steps, wanted = _loop(loop, prompts, sizes["new_tokens"])
        observer.steps.clear()
        batch = Batch(engine, [prompt], sizes["new_tokens"], n=streams)
        batch.wait()
        if batch.tokens != wanted:
            raise ParityError("the engine's tokens are not the loop's")
        if repeat:  # The first round warms up.
            loop_ms += steps
            engine_ms += [one.inter_token[0] * 1e3 for one in observer.steps if one.inter_token]
    own, bare = summarise(engine_ms), summarise(loop_ms)
    assert own is not None and bare is not None
    return {
        "loop_ms": asdict(bare),
        "engine_ms": asdict(own),
        "overhead_ms": own.median - bare.median,
        "engine_over_loop": own.median / bare.median,
        "loop_tokens_per_second": streams / bare.median * 1e3,
        "engine_tokens_per_second": streams / own.median * 1e3,
    }


def _loop(backend: Backend, prompts: list[list[int]], count: int) -> tuple[list[float], list[list[int]]]:
    params = [SamplingParams(max_new_tokens=count)] * len(prompts)
    steps = HostSteps(backend, Chooser(prompts, params), prompts, len(prompts[0]) + count)
    rows = np.arange(len(prompts))
    tokens = [steps.choose(rows, 0)]
    times = []
    for step in range(1, count):
        began = time.perf_counter()
        steps.feed(tokens[-1])
        tokens.append(steps.choose(rows, step))
        times.append((time.perf_counter() - began) * 1e3)
    return times, np.stack(tokens, axis=1).tolist()


def _arrival(
    engine: SlotEngine, observer: Observer, prompts: list[list[int]], long_prompt: list[int]
) -> dict[str, Any]:
    """Milliseconds between the streams' tokens before a long prompt arrives, and from then until it was read."""
    room = engine.n_positions - len(prompts[0])
    streams = Batch(engine, prompts, room)
    streams.wait(streams.begun)
    # Where many streams have begun one after another, the first one has long passed 32.
    wanted = len(streams.tokens[0]) + 32
    observer.steps.clear()
    while len(streams.tokens[0]) < wanted:
        time.sleep(0.01)
    steps_before = len(observer.steps)
    began = time.perf_counter()
    late = Batch(engine, [long_prompt], 1)
    late.wait(late.begun)
    seconds = time.perf_counter() - began
    steps = list(observer.steps)
    for handle in streams.handles:
        handle.cancel()
    streams.wait()
    quiet = [gap * 1e3 for one in steps[1:steps_before] for gap in one.inter_token]
    busy = [gap * 1e3 for one in steps[steps_before:] if one.prompt_tokens for gap in one.inter_token]
    pieces = [one.prompt_tokens for one in steps[steps_before:] if one.prompt_tokens]
    return {
        "first_token_ms": seconds * 1e3,
        "pieces": {"count": len(pieces), "most": max(pieces), "least": min(pieces)},
        "quiet_ms": _percentiles(quiet),
        "while_read_ms": _percentiles(busy),
        "p99_over_quiet_median": float(np.percentile(busy, 99) / np.median(quiet)),
    }


def _percentiles(samples: list[float]) -> dict[str, float]:
    return {name: float(np.percentile(samples, share)) for name, share in (("p50", 50), ("p99", 99), ("max", 100))}


if __name__ == "__main__":
    run(main)
