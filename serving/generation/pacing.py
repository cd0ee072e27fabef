"""When drafts are worth verifying: by what steps take here, measured while they run, and by how often drafts hold.

Time is counted in plain steps. Nothing here changes a token: pacing only decides how many tokens one step verifies.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

from serving.backends.base import VerifyStep
from serving.sampling.parameters import SamplingParams

TRIAL = 0.5
"""Plain steps that drafts may lose before they pause."""
_CREDIT = 1.0
"""Plain steps of earlier gains that drafts may lose besides."""
FIRST_PAUSE = 32
"""Tokens of the first pause, and of one after drafts that gained. Each further one is twice as long."""
LONGEST_PAUSE = 1024
_PLAIN_EVERY = 64
"""Verify steps in a row after which a plain one is measured."""
_STALE = 256
"""Plain tokens after which measured verify steps count half as much against what is stated of them."""
_STATED = 0.5
_HISTORY = 0.995
"""Weight of earlier drafted tokens in the history after each new one."""
_MOST_SAMPLING = 0.5
"""Most that sampling one token may count for, in plain steps, which sample one too: more is a burst of load."""
_FIRST = 3
_GAIN = 0.1


class Typical:
    """A running mean of the least of the last five values, in seconds. `value` is None before the first one.

    Other processes make values slow, several at a time where processors are shared; none makes one fast. The least of
    the first three begins it, since first runs are slow.
    """

    def __init__(self) -> None:
        self.value: float | None = None
        self._count = 0
        self._recent: deque[float] = deque(maxlen=5)

    def add(self, seconds: float) -> None:
        """Take a measured value; what is not above 0 is none."""
        if seconds <= 0:
            return
        self._count += 1
        self._recent.append(seconds)
        if self.value is None:
            self.value = seconds
        elif self._count <= _FIRST:
            self.value = min(self.value, seconds)
        else:
            self.value += _GAIN * (min(self._recent) - self.value)


class VerifyCost:
    """Seconds of a verify step by its drafted tokens, without sampling: a line through what was measured lately.

    What is stated of the steps counts as `_STATED` of them at either end of the line.
    """

    def __init__(self, step: VerifyStep) -> None:
        self.step = step
        self._sums = [0.0] * 5
        self._recent: dict[int, deque[float]] = {}
        self._cold = True

    def stated(self, length: int) -> float:
        """What is stated of such a step, in plain steps."""
        return 1 + self.step.base_cost + self.step.token_cost * length

    def line(self, plain: float) -> tuple[float, float]:
        """The estimate, if a plain step takes `plain` seconds: seconds, and those of each drafted token.

        No verify step is estimated below a plain one: then a burst of load has slowed the plain ones.
        """
        weight, x, y, xx, xy = self._sums
        for end in (1, self.step.tokens - 1):
            stated = self.stated(end) * plain
            weight, x, y = weight + _STATED, x + _STATED * end, y + _STATED * stated
            xx, xy = xx + _STATED * end * end, xy + _STATED * end * stated
        spread = weight * xx - x * x
        slope = max(0.0, (weight * xy - x * y) / spread) if spread > 0 else 0.0
        return max(plain, (y - slope * x) / weight), slope

    def add(self, length: int, seconds: float, plain: float) -> None:
        """Take a measured step, or the least of the last three of its length. The first step is slow, and ignored."""
        if self._cold or seconds <= 0:
            self._cold = False
            return
        recent = self._recent.setdefault(length, deque(maxlen=3))
        recent.append(seconds)
        fixed, each = self.line(plain)
        seconds = min(min(recent), 2 * (fixed + each * length))
        new = 1.0, length, seconds, length * length, length * seconds
        self._sums = [(1 - _GAIN) * old + value for old, value in zip(self._sums, new, strict=True)]

    def doubt(self) -> None:
        """Let measured steps count half as much: a burst of load may have slowed them."""
        self._sums = [value / 2 for value in self._sums]


class Pacing:
    """The paces of one backend, whose verify steps are `step`; sequences share them.

    Where verify steps have a tolerance, sampled sequences do not draft (docs/decisions/speculation.md).

    If not `measured`, drafts go by what is stated of steps and never pause. Proofs of equality want many drafts.
    """

    def __init__(self, step: VerifyStep, measured: bool = True) -> None:
        self.step, self.verify, self.measured = step, VerifyCost(step), measured
        self._paces: dict[Hashable, Pace] = {}

    def pace(self, params: SamplingParams, logprobs: bool = False) -> Pace:
        """The pace of sequences that are sampled alike: their tokens take the same time and are as predictable."""
        greedy = params.temperature == 0 or params.top_k == 1
        edited = bool(
            params.logit_bias or params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
        )
        kind = (0 if greedy else 1 + min(int(4 * params.temperature), 8), edited, logprobs)
        if kind not in self._paces:
            # Of sampled tokens, too many are uncertain. The positions that they repeat cost more than drafts gain.
            never = self.measured and self.step.tolerance > 0 and not greedy
            self._paces[kind] = Pace(self.verify, self.measured, never)
        return self._paces[kind]


class Pace:
    """Whether sequences of one kind draft.

    The rule is the expected gain of a draft, by `costs`. A balance of plain steps, gained less lost, bounds what the
    rule may lose. Verify steps that give too few tokens lower it, and so do the time to look for drafts and repeated
    positions. Where it falls below -TRIAL, drafts pause. The next pause is twice as long unless drafts gained in
    between, so drafts that do not hold lose a share of the time that goes to zero.

    Attributes:
        never: whether sequences of the kind do not draft at all, so that their steps need not be measured.
    """

    def __init__(self, verify: VerifyCost, measured: bool = True, never: bool = False) -> None:
        self._verify, self._measured, self.never = verify, measured, never
        self._plain, self._token, self._drafting = Typical(), Typical(), Typical()
        self._checked, self._next = Typical(), Typical()
        """Plain steps after inexact positions, whose tokens are checked, and those right after a verify step."""
        self._balance = self._gained = 0.0
        self._pause, self._wait = FIRST_PAUSE // 2, 0
        self._in_a_row = self._since = 0
        self._history: dict[tuple[str, int], tuple[float, float]] = {}

    @property
    def drafts(self) -> bool:
        """Whether the next step may verify a draft."""
        return not self.never and not self._wait and self._in_a_row < _PLAIN_EVERY

    def costs(self) -> tuple[float, float, float]:
        """What a verify step takes, in plain steps: itself, each drafted token, and each token that it gives."""
        plain = self._plain.value
        if plain is None:
            return 1 + self._verify.step.base_cost, self._verify.step.token_cost, 0.0
        fixed, drafted = self._verify.line(plain)
        # Two sessions take each other's weights out of the processor's caches.
        if not self._in_a_row and self._next.value is not None:
            fixed += max(0.0, self._next.value - plain)
        given = min((self._token.value or 0.0) / plain, _MOST_SAMPLING)
        return (fixed + (self._drafting.value or 0.0)) / plain, drafted / plain, given

    def on_plain(self, seconds: float, drafting: float = 0.0, exact: bool = True) -> None:
        """Record a step of one token, and the seconds before it that were spent on a draft that was not worth it.

        After inexact positions, a step takes longer: its token is checked.
        """
        after_verify, self._in_a_row = self._in_a_row > 0, 0
        if not self._measured:
            return
        self._since += 1
        if exact and not after_verify:
            self._plain.add(seconds)
        plain = self._plain.value
        if self._wait:
            self._wait -= 1
        if plain is None:
            return
        if self._since % _STALE == 0:
            self._verify.doubt()
        if drafting > 0:
            self._drafting.add(drafting)
            self._add(-(self._drafting.value or 0.0) / plain)
        if not exact:
            self._checked.add(seconds)
            self._add(min(0.0, 1 - (self._checked.value or 0.0) / plain))
        elif after_verify:
            self._next.add(seconds)
            self._add(min(0.0, 1 - (self._next.value or 0.0) / plain))

    def on_verified(self, length: int, emitted: int, drafting: float, verifying: float, sampling: float) -> None:
        """Record a step that verified `length` drafted tokens and gave `emitted`; seconds of its three parts."""
        self._in_a_row += 1
        self._since = 0
        self._drafting.add(drafting)
        if self._plain.value is not None:
            self._verify.add(length, verifying, self._plain.value)
        if emitted:
            self._token.add(sampling / emitted)
        fixed, drafted, given = self.costs()
        self._add(emitted - (fixed + drafted * length + given * emitted))

    def on_replayed(self) -> None:
        """Record a repeated position."""
        self._add(-1)

    def share(self, source: tuple[str, int]) -> float:
        """How often drafted tokens of `source` were right, as a multiple of their confidences."""
        expected, actual = self._history.get(source, (0.0, 0.0))
        return (4 + actual) / (4 + expected)

    def judge(self, source: tuple[str, int], confidence: float, right: bool) -> None:
        """Record a token that `source` proposed, drafted or not."""
        expected, actual = self._history.get(source, (0.0, 0.0))
        self._history[source] = expected * _HISTORY + confidence, actual * _HISTORY + right

    def _add(self, steps: float) -> None:
        if self._wait or not self._measured:
            return
        self._balance = min(self._balance + steps, _CREDIT)
        self._gained += steps
        if self._balance < -TRIAL:
            self._pause = FIRST_PAUSE if self._gained > 0 else min(2 * self._pause, LONGEST_PAUSE)
            self._wait, self._balance, self._gained = self._pause, 0.0, 0.0
