"""The engine compared with the bare loop, and prefill chunks with each other.

python -m benchmarks.serving.engine BUNDLE --graph ort/int8 --chunks 2.25x,64

All run in this process on the same prompts, greedily, in rounds. `loop` is a decode step of `serving.generation` with
its sampling; `engine` is the time between two tokens of one stream while all streams decode. Then a long prompt
arrives while the streams run, and the time between their tokens is measured until its prefill ends. At last, in a
closed loop, each stream asks again whenever its text is complete, which shows the total cost of chunked prefill.
"""

from __future__ import annotations

import functools
import itertools
import json
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.common.hardware import environment
from benchmarks.common.held_out_text import cut_prompts, read_text
from benchmarks.common.standalone import run
from benchmarks.common.statistics import paired, summarise
from benchmarks.serving.bare import bare
from benchmarks.suite.machine.contention import Others
from serving.backends.base import Backend
from serving.backends.loader import load_backend
from serving.bundle import Bundle, open_bundle
from serving.engine.api import Event, FinishEvent, GenerationRequest, RequestRecord, StepRecord, TokenEvent
from serving.engine.config import EngineConfig
from serving.engine.engine import SlotEngine, open_engine
from serving.errors import ParityError
from serving.generation.token_selection import BatchSampler, HostSteps
from serving.sampling import SamplingParams


# fmt: off
@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--graph", default="ort/fp32", show_default=True, help="Graph of the bundle to run.")
@click.option("--streams", default="1,4,16", show_default=True, help="Numbers of streams.")
@click.option("--prompt-tokens", default=128, show_default=True, help="Length of each stream's prompt.")
@click.option("--new-tokens", default=48, show_default=True, help="New tokens of each stream.")
@click.option("--long-prompt", default=900, show_default=True, help="Tokens of the arriving prompt; 0 for none.")
@click.option("--seconds", default=5, show_default=True, help="Time of each closed loop; 0 leaves it out.")
@click.option("--max-length", type=int, help="Positions of a slot.  [default: the model's context]")
@click.option("--chunks", default=f"{EngineConfig().prefill_slowdown}x", show_default=True,
              help="Prefill chunks to compare: a fixed number of tokens (64), or the multiple of a decode step that a "
              "fitted chunk may take (2.25x).")
@click.option("--repeats", default=3, show_default=True, help="Number of rounds; the chunks take turns in each.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the record as JSON to FILE.")
def main(
    bundle: Path, graph: str, streams: str, chunks: str, max_length: int | None, output: Path | None, **sizes: int
) -> None:
    """Measure the engine on the folder BUNDLE."""
    opened = open_bundle(bundle, check="sizes")
    text = read_text(opened)
    record: dict[str, Any] = {"environment": environment(), "graph": graph, "max_length": max_length, **sizes}
    record |= {"decode": [], "arrival": [], "closed": []}
    long_prompt, seconds, fresh = sizes.pop("long_prompt"), sizes.pop("seconds"), itertools.count()
    observer, pacings = Observer(), chunks.split(",")
    engines = {chunk: _open(opened, graph, max_length, chunk, observer) for chunk in pacings}
    loop, others = load_backend(opened, "onnx", graph), Others([])
    for count in [int(each) for each in streams.split(",")]:
        prompt = cut_prompts(text, 1, sizes["prompt_tokens"])[0]
        # A chunk makes no difference to a step without prefill.
        row = {"streams": count, **_decode(loop, engines[pacings[0]], observer, prompt, count, sizes)}
        record["decode"].append(row)
        arrivals: dict[str, list[dict[str, Any]]] = {chunk: [] for chunk in pacings}
        closed: dict[str, list[dict[str, Any]]] = {chunk: [] for chunk in pacings}
        for repeat in range(sizes["repeats"]):
            # The order rotates, so that no pacing always runs after the same other one.
            for chunk in pacings[repeat % len(pacings) :] + pacings[: repeat % len(pacings)]:
                engine = engines[chunk]
                if long_prompt:
                    # All slots but the one that the long prompt needs.
                    prompts = cut_prompts(text, min(count, engine.stats().slots - 1), sizes["prompt_tokens"])
                    # Another first token each time, so that nothing of it is in the prefix cache.
                    late = [next(fresh), *cut_prompts(text, 1, long_prompt)[0][1:]]
                    arrivals[chunk].append(_arrival(engine, observer, prompts, late))
                if seconds:
                    seed = count + 1000 * repeat
                    closed[chunk].append(
                        bare(engine, count, seconds, sizes["prompt_tokens"], sizes["new_tokens"], seed)
                    )
                click.echo(f"{count} streams, repeat {repeat + 1}, chunk {chunk}", err=True)
        record["arrival"] += [{"chunk": chunk, "streams": count, "runs": runs} for chunk, runs in arrivals.items()]
        record["closed"] += [{"chunk": chunk, "streams": count, "runs": runs} for chunk, runs in closed.items()]
    for engine in engines.values():
        engine.close()
    record["others_cpu_share"] = others.share()
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    click.echo(table(record))
# fmt: on


def _open(bundle: Bundle, graph: str, max_length: int | None, chunk: str, observer: Observer) -> SlotEngine:
    pace: dict[str, Any] = {"prefill_chunk": int(chunk)} if chunk.isdigit() else {}
    pace = pace or {"prefill_slowdown": float(chunk.removesuffix("x"))}
    # Chunks are compared next to plain decode steps.
    return open_engine(bundle, graph, "cpu", EngineConfig(max_length=max_length, speculation="off", **pace), observer)


def table(record: dict[str, Any]) -> str:
    """Return a Markdown table: medians over the rounds, and the verdict on tokens/s of each chunk over the first."""
    lines = [
        f"{record['graph']}; other programs took {record['others_cpu_share'] or 0:.0%} of the cores",
        "",
        "| streams | chunk | p99 / quiet median, long prompt | its first token, ms | tokens/s | first token p50, ms "
        "| between tokens p99, ms | tokens/s over the first chunk |",
        "|---|---|---|---|---|---|---|---|",
    ]
    reference: list[float] = []
    for arrival, closed in zip(record["arrival"], record["closed"], strict=True):
        rates = [run["tokens_per_second"] for run in closed["runs"]]
        if arrival["chunk"] == record["arrival"][0]["chunk"]:
            reference = rates
        verdict = paired(rates, reference) if rates else None
        told = f"{verdict.ratio:.2f}, {verdict.call}" if verdict is not None and verdict.ratio is not None else ""
        cells = [
            _median(run["p99_over_quiet_median"] for run in arrival["runs"]),
            _median(run["first_token_ms"] for run in arrival["runs"]),
            _median(rates),
            _median(run["time_to_first_token_s"]["p50"] * 1e3 for run in closed["runs"]),
            _median(run["inter_token_s"]["p99"] * 1e3 for run in closed["runs"]),
        ]
        lines.append(f"| {arrival['streams']} | {arrival['chunk']} | {' | '.join(cells)} | {told} |")
    return "\n".join(lines)


def _median(values: Iterable[float]) -> str:
    known = list(values)
    return f"{float(np.median(known)):,.1f}" if known else ""


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
    steps = HostSteps(backend, BatchSampler(prompts, params), prompts, len(prompts[0]) + count)
    rows = np.arange(len(prompts))
    tokens = [steps.sample_tokens(rows, 0)]
    times = []
    for step in range(1, count):
        began = time.perf_counter()
        steps.feed(tokens[-1])
        tokens.append(steps.sample_tokens(rows, step))
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
