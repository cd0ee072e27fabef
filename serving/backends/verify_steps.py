"""Which graphs verify drafts in ONNX Runtime, how, and what a verify step costs."""

from __future__ import annotations

from typing import Literal, get_args

from serving.backends.base import VerifyStep
from serving.bundle import Bundle
from serving.errors import InputError

SpeculationMode = Literal["auto", "on", "off"]
"""Whether a sequence that runs alone is decoded speculatively: see `speculates`."""

FP32_STEP = VerifyStep(8, tolerance=5e-5, base_cost=0.03, token_cost=0.045)
"""fp32 on a CPU: a chunk in the session of single-token steps. The tolerance is several times the largest difference
that was measured, and the costs are those of 124M on two cores (docs/decisions/speculation.md)."""
CHAIN = 4
"""Tokens of a verify step in a session of its own. Shorter ones are padded."""
CHAIN_STEP = VerifyStep(CHAIN, tolerance=0.0, base_cost=0.4, token_cost=0.0)
"""int8 and int4 on a CPU, in such a session: 6.9 ms for 4 tokens and 4.9 ms for one, int8 at 124M on two cores."""
MAX_WEIGHTS = 512 << 20
"""Bytes of the largest graph that gets a second session for verify steps."""

_SMALL = 32 << 20
"""Bytes of a graph whose verify steps take one thread. A step of such a graph has little to divide."""


def check_speculation(mode: str) -> None:
    """Raise InputError unless `mode` is a SpeculationMode."""
    if mode not in get_args(SpeculationMode):
        raise InputError(f"speculation is {mode!r}; it must be 'auto', 'on' or 'off'")


def speculates(bundle: Bundle, graph_name: str, mode: SpeculationMode) -> bool:
    """Whether `mode` has a graph decode speculatively, as far as its backend can with the tokens of plain decoding.

    "auto" does where the certificate compared the two and no second session is needed, which is ort/fp32.
    """
    if mode == "auto":
        return bundle.graph(graph_name).precision == "fp32" and bool(bundle.manifest.parity.get("speculation"))
    return mode == "on"


def is_small(bundle: Bundle, graph_name: str) -> bool:
    """Whether verify steps of a graph take one thread, so that the threads of single-token steps may keep spinning."""
    return bundle.graph_size(graph_name) <= _SMALL


def wants_verify_session(bundle: Bundle, graph_name: str) -> bool:
    """Whether a graph takes a second session to decode speculatively on a CPU."""
    graph = bundle.graph(graph_name)
    small = bundle.graph_size(graph_name) <= MAX_WEIGHTS
    return graph.cache == "shared-buffer" and graph.precision in ("int8", "int4") and small
