"""Sampling of the next token from logits: greedy, or by temperature, top-k, top-p and min-p with a counted seed.

The same seed and step give the same random number in every runtime and every batch, because the number is a hash of
the two and not the state of a generator. Everything here is written so that the same steps can be taken in TensorFlow.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from serving.errors import BundleError, InputError
from serving.sampling.detokenizer import StopAutomaton, stop_automaton
from serving.sampling.token_draw import draw_token

MAX_TEMPERATURE = 1000.0
MAX_SEED = 2**63 - 1
MAX_BIAS = 100.0

_MASK = np.uint64(0xFFFFFFFF)
_GOLDEN = np.uint64(0x9E3779B9)


@dataclass(frozen=True)
class SamplingParams:
    """How one prompt is continued. Raises InputError, naming the field, for a value out of its range."""

    max_new_tokens: int = 64
    """Tokens to generate at most, at least 1."""
    temperature: float = 0.0
    """0 takes the most likely token; above 0, it divides the logits before sampling. At most 1000."""
    top_k: int = 0
    """Sample among this many most likely tokens; 0 means all."""
    top_p: float = 1.0
    """Sample among the fewest most likely tokens that together reach this probability; above 0, at most 1."""
    min_p: float = 0.0
    """Exclude tokens less likely than this share of the most likely one; 0 to 1, 0 excludes none."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output; from 0.01 to 100."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output; from -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each occurrence in the output; from -2 to 2."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Values added to the logits of token ids, from -100 to 100; a mapping or pairs, each id once."""
    seed: int = 0
    """From 0 to 2^63 - 1; equal seeds give equal tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end the output and are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the output; unlike a stop text, the token is part of it."""
    min_tokens: int = 0
    """Minimum number of tokens before the end-of-text token or one of `stop_token_ids` can be sampled."""
    ignore_eos: bool = False
    """Continue after the end-of-text token."""

    def __post_init__(self) -> None:
        _set_integer(self, "max_new_tokens", 1, 2**31 - 1)
        _set_integer(self, "top_k", 0, 2**31 - 1)
        _set_integer(self, "seed", 0, MAX_SEED)
        _set_integer(self, "min_tokens", 0, 2**31 - 1)
        _set_number(self, "temperature", lambda value: 0 <= value <= MAX_TEMPERATURE, f"from 0 to {MAX_TEMPERATURE:g}")
        _set_number(self, "top_p", lambda value: 0 < value <= 1, "above 0 and at most 1")
        _set_number(self, "min_p", lambda value: 0 <= value <= 1, "from 0 to 1")
        _set_number(self, "repetition_penalty", lambda value: 0.01 <= value <= 100, "from 0.01 to 100")
        for name in ("presence_penalty", "frequency_penalty"):
            _set_number(self, name, lambda value: -2 <= value <= 2, "from -2 to 2")
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        if not isinstance(self.ignore_eos, bool):
            raise InputError(f"ignore_eos is {self.ignore_eos!r}; it must be true or false")
        if not isinstance(self.stop, (tuple, list)) or not all(isinstance(text, str) for text in self.stop):
            raise InputError(f"stop is {self.stop!r}; it must be a list of strings")
        for text in self.stop:
            if not text or not _encodes(text):
                raise InputError(f"stop has {text!r}; each stop string must be non-empty, valid Unicode text")
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", _checked_ids(self.stop_token_ids))

    @cached_property
    def stop_automaton(self) -> StopAutomaton | None:
        """The automaton of `stop`, built once for all texts that end there; None without any."""
        return stop_automaton(self.stop) if self.stop else None

    @cached_property
    def biases(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """`logit_bias` as token ids, ascending, and what is added to their logits; both [entries], read-only."""
        ids = np.fromiter((token for token, _ in self.logit_bias), np.int64, len(self.logit_bias))
        values = np.fromiter((value for _, value in self.logit_bias), np.float32, len(self.logit_bias))
        ids.flags.writeable = values.flags.writeable = False
        return ids, values

    def end_ids(self, eos_token_id: int | None) -> frozenset[int]:
        """The tokens that end the generation, where `eos_token_id` is the end-of-text token."""
        ends = set(self.stop_token_ids)
        if eos_token_id is not None and not self.ignore_eos:
            ends.add(eos_token_id)
        return frozenset(ends)


def _encodes(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _checked_bias(bias: Any) -> tuple[tuple[int, float], ...]:
    """`bias` (a mapping or pairs) as pairs in order of id."""
    problem = f"logit_bias is {bias!r}; it must give token ids numbers from -{MAX_BIAS:g} to {MAX_BIAS:g}, each id once"
    checked: dict[int, float] = {}
    try:
        for token, value in bias.items() if isinstance(bias, Mapping) else bias:
            whole = isinstance(token, numbers.Integral) and not isinstance(token, bool)
            numeric = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not whole or not numeric or not 0 <= int(token) < 2**31 or not abs(float(value)) <= MAX_BIAS:
                raise InputError(problem)
            if int(token) in checked:
                raise InputError(problem)
            checked[int(token)] = float(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(problem) from None
    return tuple(sorted(checked.items()))


def _checked_ids(ids: Any) -> tuple[int, ...]:
    """`ids` as a tuple of token ids."""
    numeric = isinstance(ids, (tuple, list)) and all(
        isinstance(token, numbers.Integral) and not isinstance(token, bool) and 0 <= int(token) < 2**31 for token in ids
    )
    if not numeric:
        raise InputError(f"stop_token_ids is {ids!r}; it must be a list of token ids")
    return tuple(int(token) for token in ids)


def _set_integer(params: SamplingParams, name: str, low: int, high: int) -> None:
    value = getattr(params, name)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        raise InputError(f"{name} is {value!r}; it must be an integer from {low} to {high}")
    object.__setattr__(params, name, int(value))


def _set_number(params: SamplingParams, name: str, holds: Callable[[Any], bool], bounds: str) -> None:
    value = getattr(params, name)
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or math.isnan(value) or not holds(value):
        raise InputError(f"{name} is {value!r}; it must be a number {bounds}")
    object.__setattr__(params, name, float(value))


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """lowbias32 on 32-bit values held in 64 bits (Chris Wellons, "Prospecting for Hash Functions", 2018)."""
    x = x ^ (x >> np.uint64(16))
    x = (x * np.uint64(0x7FEB352D)) & _MASK
    x = x ^ (x >> np.uint64(15))
    x = (x * np.uint64(0x846CA68B)) & _MASK
    return x ^ (x >> np.uint64(16))


def uniform(seed: ArrayLike, step: ArrayLike) -> NDArray[np.float32]:
    """A random number in [0, 1) for each seed and step (int64, broadcast together), float32 with 24 random bits.

    h = mix(low32(seed) ^ mix(high32(seed) ^ mix((step + 0x9E3779B9) mod 2^32))), result (h >> 8) * 2^-24, where mix is
    lowbias32. No intermediate reaches 2^64; in signed 64-bit arithmetic the products wrap, and their low 32 bits,
    which are all that is kept, are the same. Only the low 32 bits of `step` count.
    """
    seeds = np.asarray(seed, np.int64).astype(np.uint64)
    steps = np.asarray(step, np.int64).astype(np.uint64)
    inner = _mix(((steps & _MASK) + _GOLDEN) & _MASK)
    inner = _mix((seeds >> np.uint64(32)) ^ inner)
    mixed = _mix((seeds & _MASK) ^ inner)
    return (mixed >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)


def choose(
    logits: NDArray[np.float32],
    temperature: ArrayLike,
    top_k: ArrayLike,
    top_p: ArrayLike,
    seed: ArrayLike,
    step: ArrayLike,
    min_p: ArrayLike = 0.0,
) -> NDArray[np.int64]:
    """Sample one token id for each row: `logits` is [rows, vocab] float32, the rest and the result are [rows].

    Temperature 0 takes the greatest logit, the lowest id among equals. Otherwise, in this order:

    1. x = logits sorted descending, the lowest id first among equals, the first `top_k` kept (0 keeps all);
    2. w = exp((x - x[0]) / temperature) in float32, so that no temperature overflows;
    3. c = running sum of w in float64, from left to right, mass = last of c;
    4. token i is kept if i = 0, or c[i - 1] < top_p * mass (Hugging Face's rule: the mass before it is below top_p)
       and w[i] >= min_p (w[0] is 1);
    5. the first i whose c[i] > uniform(seed, step) * (last kept c) is chosen.

    Bias and penalties come before all this (`serving.sampling.penalties`). A row's result is computed from that row
    alone.
    Raises BundleError if a row has no finite greatest logit.
    """
    rows = logits.shape[0]
    temperatures, top_ps, min_ps = (
        np.broadcast_to(np.asarray(each, np.float32), rows) for each in (temperature, top_p, min_p)
    )
    top_ks = np.broadcast_to(np.asarray(top_k, np.int64), rows)
    certain = (temperatures == 0) | (top_ks == 1)
    # Left out where nothing is drawn: greedy rows are otherwise chosen in half the time.
    draws = np.zeros(rows, np.float32) if certain.all() else np.broadcast_to(uniform(seed, step), rows)
    chosen = np.empty(rows, np.int64)
    for row in range(rows):
        line = logits[row]
        best = int(line.argmax())
        if not np.isfinite(line[best]):
            raise BundleError(
                f"the model's greatest logit is {line[best]}, not a finite number, in row {row}; "
                "check the bundle with 'gpt2-bundle inspect'"
            )
        if certain[row]:
            chosen[row] = best
        else:
            chosen[row] = draw_token(line, temperatures[row], int(top_ks[row]), top_ps[row], min_ps[row], draws[row])
    return chosen
