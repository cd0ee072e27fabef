"""The interface between sampling and grammars: which tokens may continue one sequence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from serving.errors import BundleError, GPT2BundleError, InputError, cut
from serving.sampling.parameters import SamplingParams, SamplingRows
from serving.sampling.sampler import sample_tokens

MAX_TEXT = 32_768
"""Characters of a schema, regular expression or grammar, or of all choices together."""
MAX_CHOICES = 1024
MAX_DEPTH = 64
"""Brackets that may be open at once: parsers and compilers of grammars recurse."""
FEW = 4096
"""Tokens up to which the allowed ones are kept as ids."""
_BRACKET = re.compile(r"[][(){}]")


class ConstraintError(GPT2BundleError):
    """A sequence cannot be continued under its own grammar. It says nothing about other sequences."""


@dataclass(frozen=True)
class StructuredOutput:
    """What generated text must be. Raises InputError for text that is too long, too deep, empty or not Unicode."""

    kind: Literal["json_schema", "json_object", "regex", "choice", "grammar"]
    text: str = ""
    """A JSON Schema, a regular expression that the whole text matches, or a grammar in Lark or GBNF syntax."""
    choices: tuple[str, ...] = ()
    any_whitespace: bool = True
    """Whether JSON may have a space, or a new line with its indentation, between its tokens."""

    def __post_init__(self) -> None:
        if self.kind == "json_object":
            return
        if self.kind == "choice":
            if not 1 <= len(self.choices) <= MAX_CHOICES:
                raise InputError(f"there are {len(self.choices)} choices; give from 1 to {MAX_CHOICES}")
            if not all(self.choices):
                raise InputError("a choice is empty; each must have at least one character")
        elif not self.text.strip():
            raise InputError("it is empty; leave it out, or say what the text must be")
        texts = self.choices or (self.text,)
        if sum(map(len, texts)) > MAX_TEXT:
            raise InputError(f"it has {sum(map(len, texts))} characters; at most {MAX_TEXT} are taken")
        for text in texts:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise InputError("it is not valid Unicode text") from None
        if self.kind != "choice" and _depth(self.text) > MAX_DEPTH:
            raise InputError(f"it has more than {MAX_DEPTH} brackets open at once; nest it less deeply")


def _depth(text: str) -> int:
    """The most brackets of `text` that are open at once; those in strings count, whatever they are there."""
    depth = deepest = 0
    for bracket in _BRACKET.findall(text):
        depth = depth + 1 if bracket in "([{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


class Allowed:
    """The tokens that may follow, of which there is at least one.

    Sorting a vocabulary most of which is impossible takes milliseconds, so few tokens are kept as `ids`; and picking
    most of it takes several times as long as an addition, so many are kept as `bias`.
    """

    def __init__(self, words: NDArray[np.uint32], vocab_size: int) -> None:
        """`words` have a bit for each of `vocab_size` tokens, the lowest bit first."""
        places = np.flatnonzero(words)
        some = np.unpackbits(words[places].view(np.uint8), bitorder="little") if 32 * len(places) <= FEW else None
        self.bias: NDArray[np.float32] | None = None
        """To be added to logits [vocab]: 0, or minus infinity. None where there are few tokens."""
        if some is not None:
            at = np.flatnonzero(some.view(np.bool_))
            ids = 32 * places[at >> 5] + (at & 31)
            self._ids = ids[: np.searchsorted(ids, vocab_size)]
            self.count = len(self._ids)
            return
        bits = np.unpackbits(words.view(np.uint8), count=vocab_size, bitorder="little")
        self.count = int(np.count_nonzero(bits))
        if self.count <= FEW:
            self._ids = np.flatnonzero(bits.view(np.bool_))
        else:
            # 1 becomes 0.0 and 0 the bits of minus infinity, in a third of the time that a selection takes.
            self.bias = ((bits.astype(np.uint32) - np.uint32(1)) & np.uint32(0xFF800000)).view(np.float32)

    @classmethod
    def of(cls, bits: NDArray[np.bool_]) -> Allowed:
        """Those at which `bits` [vocab] are true."""
        padded = np.pad(bits, (0, -len(bits) % 32))
        return cls(np.packbits(padded, bitorder="little").view(np.uint32), len(bits))

    @property
    def ids(self) -> NDArray[np.int64]:
        """Their ids, ascending."""
        return self._ids if self.bias is None else np.flatnonzero(self.bias == 0)


class TokenConstraint(Protocol):
    """How far one sequence is in its grammar. While `compute` runs in another thread, only `ready` may be read."""

    ready: bool
    """Whether `allowed` answers at once."""
    done: bool
    """Whether nothing may follow what was accepted, as far as that is known before `ready`."""
    slow: bool
    """For whoever calls `compute`: whether it took long before."""

    def accept(self, token: int) -> None:
        """Take `token`, which continues the sequence. Never waits for another sequence of the same grammar."""
        ...

    def compute(self) -> None:
        """Find the tokens that may follow, and then set `ready`. Leaves the interpreter to other threads.

        A failure is raised by `allowed`.
        """
        ...

    def allowed(self) -> Allowed:
        """The tokens that may follow; computes them first if need be.

        Raises ConstraintError where the grammar has become too complex to tell.
        """
        ...


class Grammar(Protocol):
    """A compiled grammar, for any number of sequences."""

    def start(self, ends: frozenset[int] = frozenset()) -> TokenConstraint:
        """A sequence of which nothing was generated. `ends` may end it wherever the end-of-text token may."""
        ...


def ends_without_text(params: SamplingParams, eos_token_id: int, special: Mapping[str, int]) -> frozenset[int]:
    """The tokens that end a text by `params` and add nothing to it, such as the end of a chat's turn.

    `special` are the special tokens by their text.
    """
    ids = frozenset(special.values())
    return (params.end_ids(eos_token_id) & ids) | {special[text] for text in params.stop if text in special}


def sample_allowed(line: NDArray[np.float32], allowed: Allowed, params: SamplingParams, seed: int, step: int) -> int:
    """The token that `serving.sampling.sample_tokens` takes if all logits of `line` but the allowed are minus infinity.

    Raises ConstraintError if logits of minus infinity leave no allowed token.
    """
    logits = line[allowed.ids] if allowed.bias is None else line + allowed.bias
    try:
        chosen = sample_tokens(logits[None], seed=seed, step=step, **SamplingRows.of([params]).arrays())
    except BundleError:
        if np.isneginf(logits).all() and not np.isneginf(line).all():
            raise ConstraintError("the grammar allows only tokens that min_tokens holds back; lower it") from None
        raise
    return int(chosen[0] if allowed.bias is not None else allowed.ids[chosen[0]])


def complaint(text: str) -> str:
    """What a grammar library says, in one line that can be part of an error."""
    return cut(" ".join(text.split()), 240) or "no reason given"
