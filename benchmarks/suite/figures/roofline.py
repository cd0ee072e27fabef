"""The least time that the machine's limits allow: the roofline of Williams, Waterman and Patterson (2009).

Work and bytes are what the model cannot do without, from its geometry; a runtime may do more of both.
"""

from __future__ import annotations

from collections.abc import Mapping

from serving.bundle import Geometry

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


def prompt_flops(geometry: Geometry, tokens: float) -> float:
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
