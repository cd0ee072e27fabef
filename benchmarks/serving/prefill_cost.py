"""What a prefill chunk costs, and which chunk keeps steps short while a long prompt arrives.

python -m benchmarks.serving.prefill_cost BUNDLE --graph ort/int8

A step that decodes n sequences takes D(n), and with a chunk of k prompt tokens after p cached ones D(n) + C(k, p), as
both are calls of their own. C is fitted as w + g p + c k + h k p: the weights, the cached keys and values, the tokens,
and their attention. The bound of a step, `--times`, then gives the largest chunk, and that the time of the first token.
No chunk makes it shorter than times / (times - 1) of the chunks alone: that is the decode steps' share.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import click
import numpy as np

from benchmarks.common.standalone import measurement, numbers_of, run
from benchmarks.suite.machine.contention import Others
from serving.bundle import Bundle
from serving.engine.config import EngineConfig
from serving.engine.onnx_slot_backend import OnnxSlotBackend
from serving.errors import InputError

_CHUNKS = (2, 4, 8, 16, 32, 64, 128)
_OVER = ("first_token_over_alone", "fitted_first_token_over_alone")


@dataclass(frozen=True)
class ChunkCost:
    """Milliseconds of a chunk: `weights` + `cached` p + `token` k + `attention` k p."""

    weights: float
    cached: float
    token: float
    attention: float

    def ms(self, tokens: int, start: int) -> float:
        """Milliseconds of a chunk of `tokens` after `start` cached positions."""
        return self.weights + self.cached * start + (self.token + self.attention * start) * tokens

    def largest(self, start: int, allowed: float) -> int:
        """Tokens of the largest chunk after `start` positions that takes `allowed` ms; 0 if 2 tokens take longer."""
        unit = self.token + self.attention * start
        tokens = math.floor((allowed - self.ms(0, start)) / unit) if unit > 0 else 1 << 16
        return tokens if tokens >= 2 else 0


def fit(samples: Sequence[tuple[int, int, float]]) -> ChunkCost:
    """The least-squares fit of (tokens, start, ms), relative to each sample, with no negative part."""
    tokens, start, ms = np.array(samples, np.float64).T
    terms = np.stack([np.ones_like(ms), start, tokens, tokens * start], axis=1)
    used = list(range(4))
    while True:
        parts = np.zeros(4)
        parts[used] = np.linalg.lstsq(terms[:, used] / ms[:, None], np.ones_like(ms), rcond=None)[0]
        if parts.min() >= 0:
            return ChunkCost(*parts.tolist())
        used.remove(int(parts.argmin()))


def first_token_ms(cost: ChunkCost, decode_ms: float, prompt: int, chunk: Callable[[int], int]) -> tuple[float, float]:
    """Time until a prompt is read next to decode steps by chunks of `chunk(start)` tokens, and its longest step, ms."""
    start, total, longest = 0, 0.0, 0.0
    while start < prompt:
        tokens = min(max(chunk(start), 1), prompt - start)
        step = decode_ms + cost.ms(tokens, start)
        start, total, longest = start + tokens, total + step, max(longest, step)
    return total, longest


def verdict(cost: ChunkCost, decode_ms: float, prompt: int, times: float, alone_ms: float) -> dict[str, Any]:
    """The chunks that keep every step within `times` of a decode-only one, and what the first token then costs."""
    allowed = (times - 1) * decode_ms
    least = cost.largest(prompt, allowed)
    row: dict[str, Any] = {"decode_ms": decode_ms, "largest_chunk": least}
    row["times_with_2_tokens"] = 1 + cost.ms(2, prompt) / decode_ms
    if least:
        fixed, _ = first_token_ms(cost, decode_ms, prompt, lambda start: least)
        fitted, _ = first_token_ms(cost, decode_ms, prompt, lambda start: cost.largest(start, allowed))
        row |= {"first_token_over_alone": fixed / alone_ms, "fitted_first_token_over_alone": fitted / alone_ms}
    return row


def table(record: dict[str, Any]) -> str:
    """The cost model and a line for each number of streams, as Markdown."""
    cost, prompt = ChunkCost(**record["cost_ms"]), record["long_prompt"]
    lines = [
        f"{record['graph']}; other programs took {record['others_cpu_share'] or 0:.0%} of the cores",
        "",
        f"A chunk of k tokens after p takes {cost.weights:.2f} + {cost.cached:.4f} p + {cost.token:.3f} k + "
        f"{cost.attention:.6f} k p ms (largest error {record['largest_error']:.0%}); {prompt} tokens alone take "
        f"{record['alone_ms']:.0f} ms.",
        "",
        f"| streams | decode step, ms | step with 2 tokens after {prompt}, over it | largest chunk for "
        f"{record['times']:g} | first token over alone, that chunk everywhere | fitted to each step |",
        "|---|---|---|---|---|---|",
    ]
    for count, row in record["streams"].items():
        told = [f"{row[name]:.1f}" if name in row else "" for name in _OVER]
        lines.append(
            f"| {count} | {row['decode_ms']:.2f} | {row['times_with_2_tokens']:.1f} "
            f"| {row['largest_chunk'] or 'none'} | {' | '.join(told)} |"
        )
    return "\n".join(lines)


@measurement(
    click.option("--times", default=3.0, show_default=True, type=click.FloatRange(1, min_open=True),
                 help="Bound of a step with a chunk, as a multiple of a decode-only step."),
    click.option("--threads", type=click.IntRange(1), help="Threads of ONNX Runtime.  [default: the physical cores]"),
    graph="ort/fp32", table=table, streams="1,4,15", long_prompt=900, prompt_tokens=160, repeats=7,
)  # fmt: skip
def main(
    bundle: Bundle, graph: str, streams: str, long_prompt: int, prompt_tokens: int, times: float, repeats: int,
    threads: int | None,
) -> dict[str, Any]:  # fmt: skip
    """Measure prefill chunks and decode steps of the folder BUNDLE; --prompt-tokens is of decoding streams."""
    length, counts = bundle.manifest.model.n_positions, numbers_of(streams)
    chunks = [each for each in _CHUNKS if each <= long_prompt and long_prompt + each <= length]
    if not chunks or prompt_tokens >= length:
        raise InputError(f"the prompts do not fit a context of {length}; lower --long-prompt or --prompt-tokens")
    backend = OnnxSlotBackend(bundle, graph, slots=max(counts) + 1, max_length=length, threads=threads)
    # What the tokens are makes no difference to the time.
    text = np.random.default_rng(0).integers(0, backend.vocab_size, max(long_prompt, prompt_tokens)).tolist()
    slot, others = max(counts), Others([])
    for row in range(slot):
        backend.prefill_chunk(row, text[:prompt_tokens], 0)
    most = EngineConfig().max_num_batched_tokens

    def alone() -> None:
        for start in range(0, long_prompt, most):
            backend.prefill_chunk(slot, text[start : min(start + most, long_prompt)], start)

    tasks: dict[tuple[str, int, int], Callable[[], object]] = {("alone", 0, 0): alone}
    for count in counts:
        tokens_and_lengths = np.ones(count, np.int64), np.full(count, prompt_tokens, np.int64)
        tasks["decode", count, 0] = partial(backend.decode, *tokens_and_lengths)
    for start in (0, long_prompt // 2, long_prompt):
        for tokens in chunks:
            tasks["chunk", tokens, start] = partial(backend.prefill_chunk, slot, text[:tokens], start)
    taken: dict[tuple[str, int, int], list[float]] = {task: [] for task in tasks}
    for repeat in range(repeats + 1):  # The first round warms up.
        for task, call in tasks.items():
            began = time.perf_counter()
            call()
            if repeat:
                taken[task].append((time.perf_counter() - began) * 1e3)
    medians = {task: statistics.median(found) for task, found in taken.items()}
    backend.close()
    samples = [(tokens, start, ms) for (kind, tokens, start), ms in medians.items() if kind == "chunk"]
    cost, alone_ms = fit(samples), medians["alone", 0, 0]
    return {
        "others_cpu_share": others.share(), "chunks": samples, "cost_ms": asdict(cost), "alone_ms": alone_ms,
        "largest_error": max(abs(cost.ms(tokens, start) / ms - 1) for tokens, start, ms in samples),
        "first_token_over_chunks_at_least": times / (times - 1),
        "streams": {
            count: verdict(cost, medians["decode", count, 0], long_prompt, times, alone_ms) for count in counts
        },
    }  # fmt: skip


if __name__ == "__main__":
    run(main)
