"""The prefill budget: how many prompt tokens a step prefills while sequences decode."""

from __future__ import annotations

import statistics
from collections import deque

MIN_CHUNK_TOKENS = 16
"""Minimum tokens of a prefill chunk: smaller ones delay prompts and hardly shorten steps (docs/decisions/engine.md)."""
_WEIGHTS = 24
"""Number of tokens whose cost equals reading all weights and the KV cache once. Measured. The fit converges more slowly
where the true number is far from it, since only the cost of a whole chunk is measured."""
_KEEP = 0.95
_STEPS = 9


class PrefillBudget:
    """The same number of tokens in every step."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def tokens(self, start: int, prompts: int) -> int:
        """Size of the next prefill chunk, after `start` cached positions, where `prompts` prompts wait for prefill."""
        return self._tokens

    def on_step_end(self, num_prefilled: int, start: int, prefill_seconds: float, decode_seconds: float) -> None:
        """Record a step that decoded: seconds of its prefill chunk and of the rest.

        The chunk had `num_prefilled` tokens after `start`; 0 means a decode-only step.
        """


class TimedPrefillBudget(PrefillBudget):
    """The largest chunk that lengthens a step to about `slowdown` times a decode-only step; LEAST to `most` tokens.

    Each further waiting prompt allows as much again, and LEAST tokens more. Prompts wait for one another, so short
    chunks would cost the waiting ones more than they save the running sequences (docs/decisions/engine.md).

    The cost model of a chunk of k tokens after p positions is (24 + k) (a + b p) seconds. A least-squares fit of a and
    b follows the machine and its load: the weight of a chunk falls by 5 % with each later one. The time of a
    decode-only step is the median of the last 9.
    """

    def __init__(self, slowdown: float, most: int) -> None:
        super().__init__(MIN_CHUNK_TOKENS)
        self._slowdown, self._most = slowdown, max(most, MIN_CHUNK_TOKENS)
        self._decode_seconds: deque[float] = deque(maxlen=_STEPS)
        self._line = _Line()

    def tokens(self, start: int, prompts: int) -> int:
        unit, least = self._line.at(start), MIN_CHUNK_TOKENS * prompts
        if not unit:
            return min(least, self._most)
        allowed = (self._slowdown - 1) * prompts * statistics.median(self._decode_seconds)
        return int(min(max(allowed / unit - _WEIGHTS, least), self._most))

    def on_step_end(self, num_prefilled: int, start: int, prefill_seconds: float, decode_seconds: float) -> None:
        self._decode_seconds.append(decode_seconds)
        if 1 < num_prefilled <= self._most:
            self._line.add(start, prefill_seconds / (_WEIGHTS + num_prefilled))


class _Line:
    """A weighted linear fit; newer points weigh more."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, x: float, y: float) -> None:
        """Add a point. One far above the line is clipped to 1.5 times its height: most disturbances come alone."""
        if self._weight > 1:
            y = min(y, 1.5 * self.at(x))
        for name, value in (("_weight", 1.0), ("_x", x), ("_y", y), ("_xx", x * x), ("_xy", x * y)):
            setattr(self, name, _KEEP * getattr(self, name) + value)

    def at(self, x: float) -> float:
        """Height of the line at `x`, at least half the points' mean; 0 without points. The slope is never negative."""
        if not self._weight:
            return 0.0
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - mean_x**2
        slope = max(0.0, (self._xy / self._weight - mean_x * mean_y) / spread) if spread > 1 else 0.0
        return max(mean_y + slope * (x - mean_x), mean_y / 2)
