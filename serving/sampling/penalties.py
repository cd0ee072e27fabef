"""Bias and penalties as a sparse logits processor: a few token ids for each row, with their updates.

In this order, each as OpenAI, vLLM and Hugging Face define it: bias is added; the repetition penalty (Keskar et al.,
"CTRL", 2019, in Hugging Face's form) divides a positive logit and multiplies any other; frequency and presence
penalties are subtracted. Before `min_tokens`, tokens that would end the generation have a bias of minus infinity.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.sampling.parameters import SamplingParams


@dataclass
class LogitsProcessor:
    """For each row some token ids, all [rows, entries], and what to do with their logits.

    `penalty` is the sum of what is subtracted. A row with fewer entries repeats its first one, and one with none holds
    id 0 with an edit that changes nothing, so that an id that stands twice in a row has the same edit both times.
    """

    ids: NDArray[np.int64]
    bias: NDArray[np.float32]
    repetition: NDArray[np.float32]
    penalty: NDArray[np.float32]

    def apply(self, logits: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """`logits` [len(rows), vocab], which belong to `rows` of the edits, edited; a copy."""
        result = logits.copy()
        for line, row in zip(result, rows.tolist(), strict=True):
            self.apply_to(line, row)
        return result

    def apply_to(self, line: NDArray[np.float32], row: int) -> None:
        """Edit `line` [vocab], the logits of `row`, where they are."""
        ids, repetition = self.ids[row], self.repetition[row]
        some = line[ids] + self.bias[row]
        line[ids] = np.where(some > 0, some / repetition, some * repetition) - self.penalty[row]


def join_logits_processors(rows: Sequence[LogitsProcessor | None]) -> LogitsProcessor:
    """One processor with the rows of several one-row processors; None changes nothing."""
    width = max((each.ids.shape[1] for each in rows if each is not None), default=1)
    joined = LogitsProcessor(
        np.zeros((len(rows), width), np.int64),
        np.zeros((len(rows), width), np.float32),
        np.ones((len(rows), width), np.float32),
        np.zeros((len(rows), width), np.float32),
    )
    for row, each in enumerate(rows):
        if each is None:
            continue
        for name in ("ids", "bias", "repetition", "penalty"):
            target, source = getattr(joined, name), getattr(each, name)
            target[row, : source.shape[1]] = source[0]
            target[row, source.shape[1] :] = source[0, 0]
    return joined


class PenaltyState:
    """The state of the penalties of a batch, kept as a logits processor and updated token by token."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], eos_token_id: int | None = None
    ) -> None:
        """Without `eos_token_id`, only `stop_token_ids` are held back by `min_tokens`."""
        self._params = list(params)
        self._ends = [each.end_ids(eos_token_id) if each.min_tokens else frozenset() for each in params]
        self._num_generated = [0] * len(prompts)
        self._counts: list[dict[int, int]] = [{} for _ in prompts]
        rows = [_initial_updates(*row) for row in zip(prompts, params, self._ends, strict=True)]
        self._sorted = [ids for ids, *_ in rows]
        """Each row's first ids, in ascending order and in the first columns."""
        self._places: list[dict[int, int]] = [{} for _ in prompts]
        """Columns of the ids after those."""
        self.logits_processor = _stacked(rows)
        self._shared = True

    def copy(self) -> PenaltyState:
        """A copy that shares its arrays with this one until either changes them."""
        new = copy.copy(self)
        new._num_generated = list(self._num_generated)
        new._counts, new._places = ([dict(each) for each in rows] for rows in (self._counts, self._places))
        self._shared = new._shared = True
        return new

    @property
    def empty(self) -> bool:
        """Whether no edit changes anything now or later."""
        return not any(map(_changes_logits, self._params)) and not any(self._ends)

    def add(self, row: int, token: int) -> None:
        """Take in a token that `row` was continued by."""
        params = self._params[row]
        self._num_generated[row] += 1
        if self._num_generated[row] == params.min_tokens:
            self._let_end(row)
        count = self._counts[row][token] = self._counts[row].get(token, 0) + 1
        if not (params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty):
            return
        self._own()
        place = self._place(row, token)
        self.logits_processor.repetition[row, place] = params.repetition_penalty
        self.logits_processor.penalty[row, place] = params.frequency_penalty * count + params.presence_penalty
        if place == 0:
            self._pad(row)

    def _let_end(self, row: int) -> None:
        self._own()
        biases = dict(self._params[row].logit_bias)
        for token in self._ends[row]:
            self.logits_processor.bias[row, self._place(row, token)] = biases.get(token, 0)
        self._pad(row)

    def _own(self) -> None:
        """Copy the arrays if another history, or the parameters, have them too."""
        if self._shared:
            logits_processor = self.logits_processor
            self.logits_processor = LogitsProcessor(
                logits_processor.ids.copy(),
                logits_processor.bias.copy(),
                logits_processor.repetition.copy(),
                logits_processor.penalty.copy(),
            )
            self._shared = False

    def _place(self, row: int, token: int) -> int:
        """The column of `token` in `row`, a new one with an edit that changes nothing if it had none."""
        first = self._sorted[row]
        at = int(np.searchsorted(first, token))
        if at < len(first) and first[at] == token:
            return at
        places = self._places[row]
        if token not in places:
            place = places[token] = len(first) + len(places)
            width = self.logits_processor.ids.shape[1]
            if place == width:
                # Doubled, so that a long text seldom moves; the new half repeats the first entry.
                self.logits_processor = LogitsProcessor(
                    *(np.concatenate([each, np.repeat(each[:, :1], width, 1)], 1) for each in self._all)
                )
            for each, neutral in zip(self._all, (token, 0, 1, 0), strict=True):
                each[row, place] = neutral
        return places[token]

    @property
    def _all(self) -> tuple[NDArray[np.int64] | NDArray[np.float32], ...]:
        return (
            self.logits_processor.ids,
            self.logits_processor.bias,
            self.logits_processor.repetition,
            self.logits_processor.penalty,
        )

    def _pad(self, row: int) -> None:
        used = max(1, len(self._sorted[row]) + len(self._places[row]))
        for each in self._all:
            each[row, used:] = each[row, 0]


def _initial_updates(
    prompt: Sequence[int], params: SamplingParams, ends: frozenset[int]
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """The ids that are edited from the beginning, in ascending order, their biases and their repetition penalties."""
    ids, bias = params.biases
    said = np.array(sorted(set(prompt)) if params.repetition_penalty != 1 else [], np.int64)
    ending = np.array(sorted(ends), np.int64)
    if not len(said) and not len(ending):
        return ids, bias, np.ones(len(ids), np.float32)
    every = np.union1d(np.union1d(ids, said), ending)
    biases, repetition = np.zeros(len(every), np.float32), np.ones(len(every), np.float32)
    biases[np.searchsorted(every, ids)] = bias
    biases[np.searchsorted(every, ending)] = -np.inf
    repetition[np.searchsorted(every, said)] = params.repetition_penalty
    return every, biases, repetition


def _stacked(rows: Sequence[tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]]) -> LogitsProcessor:
    """The first edits of all rows as one; those of a single row are not copied."""
    each = [
        LogitsProcessor(ids[None], bias[None], repetition[None], np.zeros((1, len(ids)), np.float32))
        if len(ids)
        else None
        for ids, bias, repetition in rows
    ]
    return each[0] if len(each) == 1 and each[0] is not None else join_logits_processors(each)


def _changes_logits(params: SamplingParams) -> bool:
    penalties = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
    return bool(penalties or params.logit_bias)
