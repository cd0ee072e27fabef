"""Drafts are verified where that pays here, by measured time, and cost next to nothing where it does not."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from serving.backends.base import VerifyStep
from serving.generation.drafts import Drafter
from serving.generation.pacing import FIRST_PAUSE, Pacing, Typical
from serving.sampling import SamplingParams

STEP = VerifyStep(8, tolerance=0.0, base_cost=0.03, token_cost=0.045)
PLAIN = 1e-3


class Simulated:
    """Streams whose steps take simulated time, with a table whose drafts hold as often as `holds` says."""

    def __init__(
        self,
        holds: Callable[[int], float],
        verify: Callable[[int], float] = lambda length: PLAIN * (1.1 + 0.05 * length),
        looks: float = 0.02 * PLAIN,
        stated: VerifyStep = STEP,
    ) -> None:
        self.pacing = Pacing(stated)
        self.holds, self.verify, self.looks = holds, verify, looks
        self.random = random.Random(0)
        self.seconds = 0.0
        self.tokens = self.plain = self.verified = 0
        self.spike = 0.0

    def continuation(self, tokens: list[int], count: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        return tuple(tokens[-1] + 1 + place for place in range(count)), (0.9,) * count

    def run(self, count: int, params: SamplingParams | None = None) -> float:
        """Decode `count` tokens in one stream; return the time as a multiple of plain decoding's."""
        pace = self.pacing.pace(params or SamplingParams())
        drafter = Drafter(self.pacing.step.tokens, pace, self)
        sequence, done, began = [0], 0, self.seconds
        while done < count:
            draft, looked = None, 0.0
            if pace.drafts:
                drafter.extend(sequence[len(drafter.tokens) :])
                draft, looked = drafter.draft(count - done - 1), self.looks
            if draft is None:
                sequence.append(self._next(sequence))
                done += 1
                self.plain += 1
                self.seconds += PLAIN + looked
                pace.on_plain(PLAIN, looked)
                continue
            took, emitted = self.verify(len(draft.tokens)) + self.spike, 0
            self.spike = 0.0
            for drafted in (*draft.tokens, None):
                sequence.append(self._next(sequence))
                emitted += 1
                if sequence[-1] != drafted:
                    break
            done += emitted
            self.verified += 1
            self.seconds += took + looked
            pace.on_verified(len(draft.tokens), emitted, looked, took, 0.0)
        self.tokens += done
        return (self.seconds - began) / (PLAIN * done)

    def _next(self, sequence: list[int]) -> int:
        right = self.random.random() < self.holds(len(sequence))
        return sequence[-1] + 1 if right else -1000 - len(sequence)


def test_drafts_that_always_lie_cost_less_than_two_in_a_hundred_steps() -> None:
    run = Simulated(lambda place: 0.0)
    assert run.run(128) < 1.02
    assert run.run(4000) < 1.005
    assert run.verified < 10


def test_short_streams_share_what_was_learned() -> None:
    run = Simulated(lambda place: 0.0)
    times = [run.run(64) for _ in range(40)]
    assert max(times) < 1.03 and sum(times) / len(times) < 1.01


def test_looking_for_drafts_that_are_never_worth_it_pauses_too() -> None:
    run = Simulated(lambda place: 0.0, looks=0.1 * PLAIN)
    assert run.run(4000) < 1.01


def test_drafts_that_always_hold_are_used_in_nearly_every_step() -> None:
    run = Simulated(lambda place: 1.0)
    assert run.run(2000) < 0.3
    assert run.plain < 0.05 * run.verified


@pytest.mark.parametrize("holds", [0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
@pytest.mark.parametrize("cost", [0.1, 0.5, 0.9])
def test_no_rate_of_right_drafts_and_no_cost_makes_a_stream_slower(holds: float, cost: float) -> None:
    """What is stated of verify steps may be far from what they take here."""
    run = Simulated(lambda place: holds, lambda length: PLAIN * (1 + cost + cost / 4 * length))
    assert run.run(4000) < 1.01
    if holds >= 0.9 and cost == 0.1:
        assert run.run(1000) < 0.6


def test_text_that_becomes_predictable_is_drafted_again() -> None:
    run = Simulated(lambda place: float(place > 3000))
    assert run.run(3000) < 1.01
    before = run.verified
    assert run.run(9000) < 0.8 and run.verified > before + 500


def test_a_slow_first_verify_step_does_not_end_drafts() -> None:
    run = Simulated(lambda place: 1.0)
    run.spike = 50 * PLAIN
    run.run(2000)
    assert run.run(1000) < 0.35


def test_look_ups_that_lose_the_processor_do_not_end_drafts() -> None:
    """Text of which few drafts are worth it, on a busy machine: every twentieth look-up takes as long as ten steps."""
    run = Simulated(lambda place: float(place % 100 > 50))
    calls = itertools.count(1)
    original, gains = run.continuation, []

    def continuation(tokens: list[int], count: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        run.looks = PLAIN * (10 if next(calls) % 20 == 0 else 0.01)
        return original(tokens, count)

    run.continuation = continuation  # type: ignore[method-assign]
    for _ in range(10):
        run.run(400)
        gains.append(run.verified)
    assert gains[-1] - gains[-5] > 40


def test_a_busy_machine_makes_no_bad_draft_look_good() -> None:
    """Steps lose the processor for several times their own length, plain ones more often."""
    run, noise = Simulated(lambda place: 0.15), random.Random(1)
    pace = run.pacing.pace(SamplingParams())
    plain, verified = pace.on_plain, pace.on_verified

    def on_plain(seconds: float, drafting: float = 0.0, exact: bool = True) -> None:
        plain(seconds + noise.choice((0, 4, 8)) * PLAIN, drafting, exact)

    def on_verified(length: int, emitted: int, drafting: float, verifying: float, sampling: float) -> None:
        verified(length, emitted, drafting, verifying + noise.choice((0, 0, 4)) * PLAIN, sampling)

    pace.on_plain, pace.on_verified = on_plain, on_verified  # type: ignore[method-assign]
    assert run.run(4000) < 1.01


def test_sequences_of_other_settings_are_judged_apart() -> None:
    run = Simulated(lambda place: 0.0)
    run.run(500)
    run.holds = lambda place: 1.0
    assert run.run(400, SamplingParams(temperature=0.8)) < 0.4


def test_where_verify_steps_have_a_tolerance_sampled_sequences_do_not_draft() -> None:
    pacing = Pacing(replace(STEP, tolerance=1e-5))
    drafts = {temperature: pacing.pace(SamplingParams(temperature=temperature)).drafts for temperature in (0.0, 0.8)}
    assert drafts == {0.0: True, 0.8: False}
    assert pacing.pace(SamplingParams(temperature=0.8, top_k=1)).drafts
    assert Pacing(pacing.step, measured=False).pace(SamplingParams(temperature=0.8)).drafts


def test_a_plain_step_that_a_verify_step_slows_counts_against_drafts() -> None:
    slowed, pace = 0, Pacing(STEP).pace(SamplingParams())
    for _ in range(50):
        pace.on_plain(PLAIN)
    while pace.drafts and slowed < 100:
        # Each verify step gains a tenth of a step, and the next plain one loses half.
        pace.on_verified(1, 2, 0.0, 1.9 * PLAIN, 0.0)
        pace.on_plain(1.5 * PLAIN)
        slowed += 1
    assert slowed < 10


def test_a_pause_doubles_until_drafts_gain() -> None:
    pace = Pacing(STEP).pace(SamplingParams())
    pauses = []
    for _ in range(3):
        while pace.drafts:
            pace.on_replayed()
        pauses.append(0)
        while not pace.drafts:
            pace.on_plain(PLAIN)
            pauses[-1] += 1
    assert pauses == [FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE]
    for _ in range(2):
        pace.on_verified(7, 8, 0.0, 1.4 * PLAIN, 0.0)
    while pace.drafts:
        pace.on_replayed()
    count = 0
    while not pace.drafts:
        pace.on_plain(PLAIN)
        count += 1
    assert count == FIRST_PAUSE


def test_one_slow_value_hardly_moves_what_is_typical() -> None:
    typical = Typical()
    for value in (9.0, 1.0, 1.1, 0.0, -1.0):
        typical.add(value)
    assert typical.value == 1.0
    typical.add(1000.0)
    assert typical.value == 1.0
    for _ in range(100):
        typical.add(2.0)
    assert typical.value == pytest.approx(2.0, rel=1e-3)
