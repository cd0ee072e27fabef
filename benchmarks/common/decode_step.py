"""Prefill and decode latency of a bundle's runtimes, in process, beside the floor that memory bandwidth sets.

Repeats go round the targets in turn, so that a machine that slows down slows all of them. Every target continues the
same prompts greedily, and a hash of the tokens shows whether they did the same work.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from benchmarks.common.hardware import BandwidthProbe, environment
from benchmarks.common.statistics import summarise
from serving.backends.base import Backend
from serving.bundle import Geometry
from serving.errors import InputError

_WEIGHT_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}
# Of a cached key's or value's number: int8 and int4 keep them in int8, unless `export.int8_caches` says otherwise.
_CACHE_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "int4": 1.0}


@dataclass(frozen=True)
class Target:
    """A loaded runtime under its name in the report; `precision` is that of its weights."""

    name: str
    precision: str
    backend: Backend


@dataclass
class _Samples:
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)


def measure(
    targets: Sequence[Target],
    geometry: Geometry,
    text: Sequence[int],
    *,
    batch_sizes: Sequence[int],
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Return the record: environment, bandwidth, and a row for each target and batch size.

    Prompts are cut from `text` (token ids), repeated as often as needed. Times are milliseconds: `prefill_ms` for the
    whole batch, `decode_ms` for one step of it. Raises InputError if prompt and continuation pass the context.
    """
    if prompt_tokens + new_tokens > geometry.n_positions:
        raise InputError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones pass the context of {geometry.n_positions}; "
            "lower --prompt-tokens or --new-tokens"
        )
    probe = BandwidthProbe()
    rows = []
    for batch_size in batch_sizes:
        prompts = cut_prompts(text, batch_size, prompt_tokens)
        samples = {target.name: _Samples() for target in targets}
        for target in targets:
            _run(target.backend, prompts, min(new_tokens, 8), _Samples())
        for repeat in range(repeats):
            probe.sample()
            for target in targets:
                say(f"batch {batch_size}, repeat {repeat + 1} of {repeats}: {target.name}")
                _run(target.backend, prompts, new_tokens, samples[target.name])
        rows += [_row(target, geometry, batch_size, prompt_tokens, new_tokens, samples[target.name])
                 for target in targets]  # fmt: skip
    # The fastest pass seen anywhere in the run is the nearest thing to what the memory can do.
    bandwidth = max(probe.samples)
    for row in rows:
        floor = row["bytes_per_step"] / bandwidth * 1e3
        row["floor_ms"] = floor
        row["decode_over_floor"] = row["decode_ms"]["median"] / floor if row["decode_ms"] else None
    return {
        "environment": environment(),
        "read_bandwidth_bytes_per_second": bandwidth,
        "read_bandwidth_samples": probe.samples,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "geometry": asdict(geometry),
        "rows": rows,
    }


def cut_prompts(text: Sequence[int], batch_size: int, prompt_tokens: int) -> list[list[int]]:
    """Cut `batch_size` prompts from a text taken as a ring, one behind the other."""
    ring = np.asarray(text)
    starts = np.arange(batch_size)[:, None] * prompt_tokens
    prompts: list[list[int]] = ring[(starts + np.arange(prompt_tokens)) % len(ring)].tolist()
    return prompts


def step_bytes(geometry: Geometry, precision: str, batch_size: int, cached: float) -> float:
    """Fewest bytes that a decode step reads: every weight once, and each row's cached keys and values.

    The position table is left out, of which a step reads a row; the token table is the head's matrix, read whole.
    """
    weights = (geometry.parameters - geometry.n_positions * geometry.n_embd) * _WEIGHT_BYTES[precision]
    return weights + batch_size * cache_bytes(geometry, precision, cached)


def cache_bytes(geometry: Geometry, precision: str, positions: float) -> float:
    """Bytes of one row's keys and values at so many positions."""
    return 2 * geometry.n_layer * geometry.n_embd * _CACHE_BYTES[precision] * positions


def _run(backend: Backend, prompts: list[list[int]], new_tokens: int, samples: _Samples) -> None:
    began = time.perf_counter()
    state, logits = backend.prefill(prompts, len(prompts[0]) + new_tokens)
    samples.prefill.append((time.perf_counter() - began) * 1e3)
    tokens = [logits.argmax(-1)]
    for _ in range(new_tokens):
        began = time.perf_counter()
        logits = backend.decode(state, tokens[-1])
        samples.decode.append((time.perf_counter() - began) * 1e3)
        tokens.append(logits.argmax(-1))
    samples.tokens.add(hashlib.sha256(np.stack(tokens).astype("<i8").tobytes()).hexdigest())


def _row(
    target: Target, geometry: Geometry, batch_size: int, prompt_tokens: int, new_tokens: int, samples: _Samples
) -> dict[str, Any]:
    prefill, decode = summarise(samples.prefill), summarise(samples.decode)
    return {
        "target": target.name,
        "precision": target.precision,
        "batch_size": batch_size,
        "prefill_ms": asdict(prefill) if prefill else None,
        "decode_ms": asdict(decode) if decode else None,
        "decode_tokens_per_second": batch_size / decode.median * 1e3 if decode else None,
        "bytes_per_step": step_bytes(geometry, target.precision, batch_size, prompt_tokens + new_tokens / 2),
        "weight_bytes_per_step": step_bytes(geometry, target.precision, batch_size, 0),
        "tokens_sha256": sorted(samples.tokens),
    }
