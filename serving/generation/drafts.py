"""Drafts for speculative decoding: tokens that are likely to come next, from sources that cost no model.

A draft only decides how many tokens one step verifies. The tokens that come out do not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serving.backends.base import NextTokens
from serving.generation.pacing import Pace

_ORDERS = {4: 0.6, 3: 0.4, 2: 0.2}
"""Tokens that prompt lookup matches, and how often the token after such a match is right at first. Estimates; the
sequence's own figures replace them."""
_PRIOR = 4.0
"""Tokens that those estimates, and the confidences of a table, count for."""
_KEEP = 0.97
"""Weight of the earlier tokens in those figures after each new one."""
_LEAST_GAIN = 1.08
"""Least expected gain of a draft, as a multiple of the tokens per second of plain decoding."""


@dataclass(frozen=True)
class Draft:
    """Drafted tokens. `source` is "prompt" or "ngram"; `confidence` is that of each token, given those before it."""

    source: str
    tokens: tuple[int, ...]
    confidence: tuple[float, ...]
    group: int
    """Drafts of one source and group are right equally often."""


class PromptLookup:
    """Finds the last earlier place where the latest tokens of a sequence stand, and drafts what followed there.

    Every token costs three dictionary updates, whatever the sequence holds.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self._found: dict[int, int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Append `tokens` to the sequence."""
        for token in tokens:
            self.tokens.append(token)
            length = len(self.tokens)
            self._found = {}
            for order in _ORDERS:
                if length < order:
                    continue
                key = tuple(self.tokens[-order:])
                place = self._after.get(key)
                if place is not None:
                    self._found[order] = place
                self._after[key] = length

    def draft(self, count: int) -> tuple[int, tuple[int, ...]] | None:
        """The longest match's order and the `count` tokens after it; None without a match.

        Tokens past the end of the sequence repeat the draft: the text is periodic there.
        """
        if not self._found:
            return None
        order = max(self._found)
        place = self._found[order]
        drafted: list[int] = []
        for index in range(place, place + count):
            drafted.append(self.tokens[index] if index < len(self.tokens) else drafted[index - len(self.tokens)])
        return order, tuple(drafted)


class Drafter:
    """Drafts for one sequence, and how often its drafts were right.

    Args:
        tokens: the most tokens of a verify step.
        pace: what steps take, and how often drafts of sequences like this one were right.
        table: likely next tokens, or None.

    A draft is as long as its expected tokens per second are highest. Sources are judged by every token of the
    sequence for which there was a proposal, drafted or not.
    """

    def __init__(self, tokens: int, pace: Pace, table: NextTokens | None = None) -> None:
        self._lookup, self._table, self._most, self._pace = PromptLookup(), table, tokens, pace
        self._figures: dict[tuple[str, int], tuple[float, float]] = {}
        self._proposals: list[Draft] = []

    @property
    def tokens(self) -> Sequence[int]:
        """The sequence so far."""
        return self._lookup.tokens

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens of the prompt, or tokens that were sampled."""
        for draft in self._proposals:
            self._judge(draft, tokens)
        self._proposals = []
        self._lookup.extend(tokens)

    def draft(self, room: int) -> Draft | None:
        """The draft for the next step, of at most `room` tokens; None if plain decoding is expected to be as fast."""
        count = min(room, self._most - 1)
        if count < 1:
            return None
        self._proposals = self._propose(count)
        best, gain = None, _LEAST_GAIN
        costs = self._pace.costs()
        for draft in self._proposals:
            length, expected = self._length(draft, costs)
            if expected > gain:
                gain = expected
                best = Draft(draft.source, draft.tokens[:length], draft.confidence[:length], draft.group)
        return best

    def _propose(self, count: int) -> list[Draft]:
        drafts = []
        found = self._lookup.draft(count)
        if found is not None:
            order, tokens = found
            drafts.append(Draft("prompt", tokens, (_ORDERS[order],) * count, order))
        if self._table is not None:
            tokens, confidence = self._table.continuation(self._lookup.tokens, count)
            if tokens:
                drafts.append(Draft("ngram", tokens, confidence, int(4 * confidence[0])))
        return drafts

    def _length(self, draft: Draft, costs: tuple[float, float, float]) -> tuple[int, float]:
        """The best length of `draft`, and its tokens per second as a multiple of plain decoding's."""
        fixed, drafted, given = costs
        expected, actual = self._figures.get((draft.source, draft.group), (0.0, 0.0))
        prior = draft.confidence[0] * _PRIOR
        shared = self._pace.share((draft.source, draft.group))
        scale = (prior * shared + actual) / (prior + expected) if prior + expected else 0.0
        best, gain, together, number = 0, 0.0, 1.0, 1.0
        for length, confidence in enumerate(draft.confidence, 1):
            together *= min(confidence * scale, 0.99)
            number += together
            rate = number / (fixed + drafted * length + given * number)
            if rate > gain:
                best, gain = length, rate
        return best, gain

    def _judge(self, draft: Draft, tokens: Sequence[int]) -> None:
        """Compare `draft` with the `tokens` that came, up to the first that differs."""
        key = (draft.source, draft.group)
        expected, actual = self._figures.get(key, (0.0, 0.0))
        for token, drafted, confidence in zip(tokens, draft.tokens, draft.confidence, strict=False):
            expected, actual = expected * _KEEP + confidence, actual * _KEEP + (token == drafted)
            self._pace.judge(key, confidence, token == drafted)
            if token != drafted:
                break
        self._figures[key] = expected, actual
