"""How far from the machine's limits a target works: the roofline of Williams, Waterman and Patterson (2009).

Work and bytes are what the model cannot do without, from its geometry; a runtime may do more of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.suite.load.events import Response
from serving.bundle import Geometry

Interval = tuple[float, float]
_WEIGHT_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}
# Of a number in the KV cache: int8 and int4 keep it in int8, unless `export.int8_kv_cache` says otherwise.
_CACHE_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "int4": 1.0}


def step_bytes(geometry: Geometry, precision: str, batch_size: float, cached: float, cache: str = "") -> float:
    """Fewest bytes that a decode step reads: every weight once, and the KV cache of each row.

    The position table is left out, of which a step reads a row; the token table is the head's matrix, read whole.
    `cache` is the precision of the KV cache if it does not follow from that of the weights.
    """
    weights = (geometry.parameters - geometry.n_positions * geometry.n_embd) * _WEIGHT_BYTES[precision]
    return weights + batch_size * cache_bytes(geometry, cache or precision, cached)


def cache_bytes(geometry: Geometry, precision: str, positions: float) -> float:
    """Bytes of one row's KV cache at this number of positions."""
    return 2 * geometry.n_layer * geometry.n_embd * _CACHE_BYTES[precision] * positions


def token_flops(geometry: Geometry, cached: float, with_head: bool = True) -> float:
    """Multiplications and additions for one token that looks at `cached` positions: matrices, attention, head."""
    width = geometry.n_embd
    blocks = geometry.n_layer * (4 * width**2 + 2 * width * geometry.n_inner)
    head = geometry.vocab_size * width if with_head else 0
    # A query times each key, and each weight times a value.
    return 2.0 * (blocks + head + 2 * geometry.n_layer * width * cached)


def prompt_flops(geometry: Geometry, tokens: int) -> float:
    """The same for a prompt; the head is needed for its last token only."""
    head = 2.0 * geometry.vocab_size * geometry.n_embd
    return tokens * token_flops(geometry, (tokens + 1) / 2, with_head=False) + head


def prefill_bytes(geometry: Geometry, precision: str, prompts: float, tokens: float) -> float:
    """Fewest bytes: every weight read once, and each prompt's keys and values written once."""
    return step_bytes(geometry, precision, 1, 0) + prompts * cache_bytes(geometry, precision, tokens)


def bound_seconds(
    flops: float, read: float, precision: str, bandwidth: float, rate: float | Mapping[str, float] | None
) -> float:
    """Return the longer of reading and arithmetic.

    `rate` is that of float32 products, which bounds no other precision, or the rates by precision.
    """
    known = rate if isinstance(rate, Mapping) else {"fp32": rate}
    compute = known.get(precision)
    return max(read / bandwidth, flops / compute if compute else 0.0)


def together(intervals: Sequence[Interval]) -> tuple[float, float]:
    """Seconds in which at least one interval lasts, and how many do on average over those."""
    union, end = 0.0, float("-inf")
    for first, last in sorted(intervals):
        union += max(0.0, last - max(first, end))
        end = max(end, last)
    return union, sum(last - first for first, last in intervals) / union if union else 0.0


def attained(responses: Sequence[Response], geometry: Geometry, precision: str) -> dict[str, Any]:
    """Attained FLOP/s and intensity (FLOPs a byte) of prefill and decode in one repeat; None where tokens are not seen.

    Prefill lasts from the start of work, or from the sending where that is not told, to the first token; decode from
    there to the last. Requests that are in one phase at once share what is read: `rows` of them on average.
    """
    seen = [each for each in responses if each.error is None and each.streamed and each.token_times]
    found: dict[str, Any] = {"prefill": None, "decode": None}
    if not seen:
        return found
    starts = [each.sent if each.started is None else each.started for each in seen]
    seconds, rows = together([(start, each.token_times[0]) for start, each in zip(starts, seen, strict=True)])
    prompt = sum(each.prompt_tokens for each in seen) / len(seen)
    work = sum(prompt_flops(geometry, each.prompt_tokens) for each in seen)
    if seconds:
        read = prefill_bytes(geometry, precision, rows, prompt) * len(seen) / rows
        found["prefill"] = {"intensity": work / read, "flops_per_second": work / seconds, "rows": rows}
    several = [each for each in seen if len(each.token_times) > 1]
    seconds, rows = together([(each.token_times[0], each.token_times[-1]) for each in several])
    if seconds:
        steps = sum(len(each.token_times) - 1 for each in several)
        cached = sum((len(each.token_times) - 1) * _positions(each) for each in several) / steps
        work = steps * token_flops(geometry, cached)
        read = step_bytes(geometry, precision, 1, rows * cached) * steps / rows
        found["decode"] = {"intensity": work / read, "flops_per_second": work / seconds, "rows": rows}
    return found


def _positions(response: Response) -> float:
    """What a decoded token of a response looks at, on average over them."""
    return response.prompt_tokens + len(response.token_times) / 2
