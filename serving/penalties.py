"""Bias and penalties as sparse edits of logits: a few token ids a row, with what happens to each.

In this order, each as OpenAI, vLLM and Hugging Face define it: bias is added; the repetition penalty (Keskar et al.,
"CTRL", 2019, in Hugging Face's form) divides a positive logit and multiplies any other; frequency and presence
penalties are subtracted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.sampling import SamplingParams


@dataclass
class Edits:
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
        ids = self.ids[rows]
        some = np.take_along_axis(logits, ids, axis=1) + self.bias[rows]
        repetition = self.repetition[rows]
        some = np.where(some > 0, some / repetition, some * repetition) - self.penalty[rows]
        result = logits.copy()
        np.put_along_axis(result, ids, some, axis=1)
        return result


class History:
    """What a batch's rows have said so far, as edits that are brought up to date token by token."""

    def __init__(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> None:
        rows = len(prompts)
        self._params = list(params)
        self._places: list[dict[int, int]] = [{} for _ in prompts]
        self._counts: list[dict[int, int]] = [{} for _ in prompts]
        self.edits = Edits(
            np.zeros((rows, 1), np.int64),
            np.zeros((rows, 1), np.float32),
            np.ones((rows, 1), np.float32),
            np.zeros((rows, 1), np.float32),
        )
        for row, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
            for token, bias in each.logit_bias:
                # The place first: it may move the arrays.
                place = self._place(row, token)
                self.edits.bias[row, place] = bias
            if each.repetition_penalty != 1:
                for token in prompt:
                    place = self._place(row, token)
                    self.edits.repetition[row, place] = each.repetition_penalty
            self._pad(row)

    @property
    def empty(self) -> bool:
        """Whether no edit changes anything now or later."""
        return not any(map(_edits, self._params))

    def add(self, row: int, token: int) -> None:
        """Take in a token that `row` was continued by."""
        params = self._params[row]
        count = self._counts[row][token] = self._counts[row].get(token, 0) + 1
        if not (params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty):
            return
        place = self._place(row, token)
        self.edits.repetition[row, place] = params.repetition_penalty
        self.edits.penalty[row, place] = params.frequency_penalty * count + params.presence_penalty
        if place == 0:
            self._pad(row)

    def _place(self, row: int, token: int) -> int:
        """The column of `token` in `row`, a new one with an edit that changes nothing if it had none."""
        places = self._places[row]
        if token not in places:
            place = places[token] = len(places)
            if place == self.edits.ids.shape[1]:
                # Doubled, so that a long text seldom moves; the new half repeats the first entry.
                self.edits = Edits(*(np.concatenate([each, np.repeat(each[:, :1], place, 1)], 1) for each in self._all))
            for each, neutral in zip(self._all, (token, 0, 1, 0), strict=True):
                each[row, place] = neutral
        return places[token]

    @property
    def _all(self) -> tuple[NDArray[np.int64] | NDArray[np.float32], ...]:
        return self.edits.ids, self.edits.bias, self.edits.repetition, self.edits.penalty

    def _pad(self, row: int) -> None:
        used = max(1, len(self._places[row]))
        for each in self._all:
            each[row, used:] = each[row, 0]


def _edits(params: SamplingParams) -> bool:
    penalties = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
    return bool(penalties or params.logit_bias)
