"""The sampling parameters, each declared once: name, type, bounds, default, meaning, and who has it.

The command line, the OpenAI and Open Inference protocols, the client and the reference page are made from these
declarations (docs/how-to-add.md). The arithmetic is in `sampler`, in the ONNX sampling graph and in the SavedModel.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from serving.errors import InputError
from serving.sampling.detokenizer import StopAutomaton, stop_automaton

MAX_TEMPERATURE = 1000.0
MAX_SEED = 2**63 - 1
MAX_BIAS = 100.0
_MAX_INT = 2**31 - 1

Kind = Literal["integer", "number", "boolean"]


@dataclass(frozen=True)
class Declaration:
    """One parameter that is a single number or flag.

    `wire` is its name in bodies of the OpenAI and Open Inference protocols, `low` and `high` its inclusive bounds, or
    exclusive below with `above_low`. `slots` says whether the slots of a SavedModel have it.
    """

    name: str
    kind: Kind
    default: Any
    help: str
    wire: str
    low: float = -math.inf
    high: float = math.inf
    above_low: bool = False
    slots: bool = False

    @property
    def option(self) -> str:
        """Its option of the command line."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def datatype(self) -> str:
        """Its tensor's type in the Open Inference Protocol."""
        if self.kind == "integer":
            return "INT32" if self.high <= _MAX_INT else "INT64"
        return "FP32" if self.kind == "number" else "BOOL"

    @property
    def bounds(self) -> str:
        """Its bounds, in words."""
        if self.kind == "integer":
            return f"an integer from {int(self.low)} to {int(self.high)}"
        if self.above_low:
            return f"a number above {self.low:g} and at most {self.high:g}"
        return f"a number from {self.low:g} to {self.high:g}"

    def checked(self, value: Any) -> Any:
        """`value` as this parameter holds it. Raises InputError for one of another type or out of bounds."""
        if self.kind == "boolean":
            if not isinstance(value, bool):
                raise InputError(f"{self.name} is {value!r}; it must be true or false")
            return value
        kind: Any = numbers.Integral if self.kind == "integer" else numbers.Real
        inside = isinstance(value, kind) and not isinstance(value, bool) and self.low <= value <= self.high
        if not inside or (self.above_low and value == self.low):
            raise InputError(f"{self.name} is {value!r}; it must be {self.bounds}")
        return int(value) if self.kind == "integer" else float(value)


def _declare(kind: Kind, default: Any, help: str, **rest: Any) -> Any:
    """A dataclass field with what its Declaration needs besides its name."""
    return dataclasses.field(default=default, metadata={"kind": kind, "default": default, "help": help, **rest})


@dataclass(frozen=True)
class SamplingParams:
    """How one prompt is continued. Raises InputError, naming the field, for a value out of its range."""

    max_new_tokens: int = _declare(
        "integer",
        64,
        "Maximum number of tokens to generate.",
        wire="max_tokens",
        low=1,
        high=_MAX_INT,
        slots=True,
    )
    temperature: float = _declare(
        "number",
        0.0,
        "Divide the logits by this value before sampling; 0 always takes the most likely token.",
        low=0,
        high=MAX_TEMPERATURE,
        slots=True,
    )
    top_k: int = _declare(
        "integer", 0, "Sample among the k most likely tokens; 0 considers all.", low=0, high=_MAX_INT, slots=True
    )
    top_p: float = _declare(
        "number",
        1.0,
        "Sample among the fewest tokens that together reach this probability; 1 considers all.",
        low=0,
        high=1,
        above_low=True,
        slots=True,
    )
    min_p: float = _declare(
        "number",
        0.0,
        "Exclude tokens less likely than this share of the most likely one; 0 excludes none.",
        low=0,
        high=1,
    )
    repetition_penalty: float = _declare(
        "number",
        1.0,
        "Values above 1 make tokens already in the prompt or the output less likely; 1 changes nothing.",
        low=0.01,
        high=100,
    )
    presence_penalty: float = _declare(
        "number", 0.0, "Subtract this from the logit of each token already in the output; 0 changes nothing.",
        low=-2, high=2,
    )  # fmt: skip
    frequency_penalty: float = _declare(
        "number", 0.0, "Subtract this once for each occurrence in the output; 0 changes nothing.", low=-2, high=2
    )
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids with what is added to their logits, from -100 to 100; a mapping or pairs, each id once."""
    seed: int = _declare(
        "integer",
        0,
        "Seed of the random numbers: equal seeds give equal text; -1 takes a new one.",
        low=0,
        high=MAX_SEED,
        slots=True,
    )
    stop: tuple[str, ...] = ()
    """Text that ends the generation and is not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the generation; unlike a stop text, the token itself counts and is given out."""
    min_tokens: int = _declare(
        "integer",
        0,
        "Minimum number of tokens before the end-of-text token or a stop token may be sampled.",
        low=0,
        high=_MAX_INT,
    )
    ignore_eos: bool = _declare("boolean", False, "Continue after the end-of-text token.", slots=True)

    def __post_init__(self) -> None:
        for each in DECLARATIONS.values():
            object.__setattr__(self, each.name, each.checked(getattr(self, each.name)))
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
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


DECLARATIONS: dict[str, Declaration] = {
    field.name: Declaration(**{"name": field.name, "wire": field.name, **field.metadata})
    for field in dataclasses.fields(SamplingParams)
    if field.metadata
}
"""By name, those that are one number or flag; `stop`, `stop_token_ids` and `logit_bias` are not among them."""


@dataclass(frozen=True)
class SamplingRows:
    """What the rows of a batch ask of the next token, each [rows]. The sampling graph has inputs of these names."""

    temperature: NDArray[np.float32]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float32]
    min_p: NDArray[np.float32]

    @classmethod
    def of(cls, params: Sequence[SamplingParams]) -> SamplingRows:
        """The rows of `params`."""
        return cls(
            **{name: np.array([getattr(each, name) for each in params], dtype) for name, dtype in ROW_DTYPES.items()}
        )

    def take(self, rows: NDArray[np.int64]) -> SamplingRows:
        """Those of `rows`, by index."""
        return SamplingRows(**{name: array[rows] for name, array in self.arrays().items()})

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays by name."""
        return {name: getattr(self, name) for name in ROW_DTYPES}

    @property
    def greedy(self) -> NDArray[np.bool_]:
        """Which rows take the most likely token, whatever the random number."""
        greedy: NDArray[np.bool_] = (self.temperature == 0) | (self.top_k == 1)
        return greedy


ROW_DTYPES: dict[str, type] = {
    field.name: np.int64 if DECLARATIONS[field.name].kind == "integer" else np.float32
    for field in dataclasses.fields(SamplingRows)
}


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
