"""The engine compared with the bare loop, and prefill chunks with each other.

python -m benchmarks.serving.engine BUNDLE --graph ort/int8 --chunks 2.25x,64

All run in this process on the same prompts, greedily, in rounds. `loop` is a decode step of `serving.generation` with
its sampling; `engine` is the time between two tokens of one stream while all streams decode. Then a long prompt
arrives while the streams run, and the time between their tokens is measured until its prefill ends. At last, in a
closed loop, each stream asks again whenever its text is complete, which shows the total cost of chunked prefill.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import click
import numpy as np

from benchmarks.common.engine_stream import Stream
from benchmarks.common.held_out_text import cut_prompts, read_text
from benchmarks.common.standalone import measurement, numbers_of, run, say
from benchmarks.common.statistics import paired, percentiles, summarise
from benchmarks.serving.load import Results, draw_prompt
from benchmarks.suite.machine.contention import Others
from serving.backends.base import Backend
from serving.backends.loader import load_backend
from serving.bundle import Bundle
from serving.engine.api import Engine, GenerationRequest, RequestRecord, StepRecord
from serving.engine.config import EngineConfig
from serving.engine.engine import SlotEngine, open_engine
from serving.errors import ParityError
from serving.generation.token_selection import BatchSampler, HostSteps
from serving.sampling import SamplingParams


class Observer:
    """Keeps all steps since it was last emptied, or none."""

    def __init__(self, kept: bool = True) -> None:
        self.steps: list[StepRecord] = []
        self._kept = kept

    def on_step(self, record: StepRecord) -> None:
        """See `serving.engine.api.Observer`."""
        if self._kept:
            self.steps.append(record)

    def on_finish(self, record: RequestRecord) -> None:
        """See `serving.engine.api.Observer`."""


def bare(
    engine: Engine, clients: int, seconds: float, prompt_tokens: int, new_tokens: int, seed: int
) -> dict[str, Any]:
    """What the load generator does, without a server: each of `clients` submits again when its text is complete."""
    results, draw, lock = Results(), random.Random(seed), threading.Lock()
    params = SamplingParams(max_new_tokens=new_tokens, temperature=0, ignore_eos=True)
    began = time.monotonic()

    def client() -> None:
        while time.monotonic() < began + seconds:
            with lock:
                prompt = tuple(draw_prompt(draw, prompt_tokens))
            stream = Stream(engine, GenerationRequest(prompt, params, logprobs=0)).wait()
            with lock:
                results.add(stream.sent, [(timestamp, 1) for timestamp in stream.times[0]], len(stream.times[0]))
                results.outcomes[stream.ends[0].reason] += 1

    threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results.summary(began, seconds)


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


@measurement(
    click.option("--max-length", type=int, help="Positions of a slot.  [default: the model's context]"),
    click.option(
        "--chunks",
        default=f"{EngineConfig().prefill_slowdown}x",
        show_default=True,
        help="Prefill chunks to compare: a fixed number of tokens (64), or the multiple of a decode step that a fitted "
        "chunk may take (2.25x).",
    ),
    graph="ort/fp32", table=table,
    streams="1,4,16", prompt_tokens=128, new_tokens=48, long_prompt=900, seconds=5.0, repeats=3,
)  # fmt: skip
def main(
    bundle: Bundle, graph: str, streams: str, chunks: str, max_length: int | None, long_prompt: int, seconds: float,
    **sizes: int,
) -> dict[str, Any]:  # fmt: skip
    """Measure the engine on the folder BUNDLE; --long-prompt 0 and --seconds 0 leave out what they belong to."""
    text, repeats = read_text(bundle), sizes.pop("repeats")
    record: dict[str, Any] = {"decode": [], "arrival": [], "closed": []}
    fresh, observer, pacings = itertools.count(), Observer(), chunks.split(",")
    engines = {chunk: _open(bundle, graph, max_length, chunk, observer) for chunk in pacings}
    loop, others = load_backend(bundle, "onnx", graph), Others([])
    for count in numbers_of(streams):
        prompt = cut_prompts(text, 1, sizes["prompt_tokens"])[0]
        # A chunk makes no difference to a step without prefill.
        decode = _decode(loop, engines[pacings[0]], observer, [prompt] * count, sizes["new_tokens"], repeats)
        record["decode"].append({"streams": count, **decode})
        runs: dict[str, dict[str, list[Any]]] = {name: {c: [] for c in pacings} for name in ("arrival", "closed")}
        for repeat in range(repeats):
            # The order rotates, so that no pacing always runs after the same other one.
            for chunk in pacings[repeat % len(pacings) :] + pacings[: repeat % len(pacings)]:
                engine = engines[chunk]
                if long_prompt:
                    # All slots but the one that the long prompt needs.
                    prompts = cut_prompts(text, min(count, engine.stats().slots - 1), sizes["prompt_tokens"])
                    # Another first token each time, so that nothing of it is in the prefix cache.
                    late = [next(fresh), *cut_prompts(text, 1, long_prompt)[0][1:]]
                    runs["arrival"][chunk].append(_arrival(engine, observer, prompts, late))
                if seconds:
                    runs["closed"][chunk].append(bare(engine, count, seconds, seed=count + 1000 * repeat, **sizes))
                say(f"{count} streams, repeat {repeat + 1}, chunk {chunk}")
        for name, by_chunk in runs.items():
            record[name] += [{"chunk": chunk, "streams": count, "runs": found} for chunk, found in by_chunk.items()]
    for engine in engines.values():
        engine.close()
    return record | {"others_cpu_share": others.share()}


def _open(bundle: Bundle, graph: str, max_length: int | None, chunk: str, observer: Observer) -> SlotEngine:
    pace: dict[str, Any] = {"prefill_chunk": int(chunk)} if chunk.isdigit() else {}
    pace = pace or {"prefill_slowdown": float(chunk.removesuffix("x"))}
    # Chunks are compared next to plain decode steps.
    return open_engine(bundle, graph, "cpu", EngineConfig(max_length=max_length, speculation="off", **pace), observer)


def _stream(engine: SlotEngine, prompt: list[int], count: int, n: int = 1) -> Stream:
    params = SamplingParams(max_new_tokens=count, ignore_eos=True)
    return Stream(engine, GenerationRequest(tuple(prompt), params, n))


def _decode(
    loop: Backend, engine: SlotEngine, observer: Observer, prompts: list[list[int]], new_tokens: int, repeats: int
) -> dict[str, Any]:
    """Milliseconds between tokens in the loop and in the engine, in turns; all rows begin and end at once."""
    streams = len(prompts)
    loop_ms: list[float] = []
    engine_ms: list[float] = []
    for repeat in range(repeats + 1):
        steps, wanted = _loop(loop, prompts, new_tokens)
        observer.steps.clear()
        if _stream(engine, prompts[0], new_tokens, n=streams).wait().tokens != wanted:
            raise ParityError("the engine's tokens are not the loop's")
        if repeat:  # The first round warms up.
            loop_ms += steps
            engine_ms += [one.inter_token[0] * 1e3 for one in observer.steps if one.inter_token]
    own, other = summarise(engine_ms), summarise(loop_ms)
    assert own is not None and other is not None
    return {
        "loop_ms": asdict(other),
        "engine_ms": asdict(own),
        "overhead_ms": own.median - other.median,
        "engine_over_loop": own.median / other.median,
        "loop_tokens_per_second": streams / other.median * 1e3,
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
    streams = [_stream(engine, prompt, room) for prompt in prompts]
    for stream in streams:
        stream.begun.wait()
    # Where many streams have begun one after another, the first one has long passed 32.
    wanted = len(streams[0].tokens[0]) + 32
    observer.steps.clear()
    while len(streams[0].tokens[0]) < wanted:
        time.sleep(0.01)
    steps_before = len(observer.steps)
    late = _stream(engine, long_prompt, 1)
    late.begun.wait()
    steps = list(observer.steps)
    for stream in streams:
        stream.handle.cancel()
        stream.wait()
    quiet = [gap * 1e3 for one in steps[1:steps_before] for gap in one.inter_token]
    busy = [gap * 1e3 for one in steps[steps_before:] if one.prompt_tokens for gap in one.inter_token]
    pieces = [one.prompt_tokens for one in steps[steps_before:] if one.prompt_tokens]
    return {
        "first_token_ms": (late.times[0][0] - late.sent) * 1e3,
        "pieces": {"count": len(pieces), "most": max(pieces), "least": min(pieces)},
        "quiet_ms": percentiles(quiet),
        "while_read_ms": percentiles(busy),
        "p99_over_quiet_median": float(np.percentile(busy, 99) / np.median(quiet)),
    }


if __name__ == "__main__":
    run(main)
