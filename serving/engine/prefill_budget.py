"""How much of a prompt a step reads beside running texts."""

from __future__ import annotations

import statistics
from collections import deque

LEAST = 16
"""Tokens of a piece: with fewer, prompts take ever longer and steps hardly less (docs/decisions/engine.md)."""
_WEIGHTS = 24
"""Tokens that cost as much as reading all weights, keys and values once. Measured; what is far from it converges more
slowly, since each piece's cost is measured as a whole."""
_KEEP = 0.95
_STEPS = 9


class Pace:
    """The same number of tokens in every step."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def tokens(self, start: int, prompts: int) -> int:
        """How many tokens of a prompt the next step may read behind `start` positions, of `prompts` to be read."""
        return self._tokens

    def stepped(self, read: int, start: int, reading: float, other: float) -> None:
        """Take note of a step of running texts: seconds for `read` tokens behind `start` positions, and for all else.

        `read` is 0 where no prompt was read.
        """


class BoundedPace(Pace):
    """As many tokens as keep a step's time at about `slowdown` times that of one that reads nothing, LEAST to `most`.

    Of several prompts to be read each allows as much again, and LEAST tokens more: they wait for one another, so what
    running texts gain by shorter pieces is lost many times in front of them (docs/decisions/engine.md).

    A piece of k tokens behind p positions is taken to cost (24 + k) (a + b p) seconds. a and b are fitted to the pieces
    that were read, by least squares whose weights fall by 5 % a piece, so they follow the machine and its load. What a
    step takes without its piece is the median of the last 9.
    """

    def __init__(self, slowdown: float, most: int) -> None:
        super().__init__(LEAST)
        self._slowdown, self._most = slowdown, max(most, LEAST)
        self._others: deque[float] = deque(maxlen=_STEPS)
        self._line = _Line()

    def tokens(self, start: int, prompts: int) -> int:
        unit, least = self._line.at(start), LEAST * prompts
        if not unit:
            return min(least, self._most)
        allowed = (self._slowdown - 1) * prompts * statistics.median(self._others)
        return int(min(max(allowed / unit - _WEIGHTS, least), self._most))

    def stepped(self, read: int, start: int, reading: float, other: float) -> None:
        self._others.append(other)
        if 1 < read <= self._most:
            self._line.add(start, reading / (_WEIGHTS + read))


class _Line:
    """A line through points, the newest of which count most."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, x: float, y: float) -> None:
        """One more point; one far above the line counts as half as far again, as a disturbance mostly is alone."""
        if self._weight > 1:
            y = min(y, 1.5 * self.at(x))
        for name, value in (("_weight", 1.0), ("_x", x), ("_y", y), ("_xx", x * x), ("_xy", x * y)):
            setattr(self, name, _KEEP * getattr(self, name) + value)

    def at(self, x: float) -> float:
        """Its height, at least half the points' mean; 0 without points. It never falls."""
        if not self._weight:
            return 0.0
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - mean_x**2
        slope = max(0.0, (self._xy / self._weight - mean_x * mean_y) / spread) if spread > 1 else 0.0
        return max(mean_y + slope * (x - mean_x), mean_y / 2)
