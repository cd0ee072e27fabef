"""How much of a prompt a step reads beside running texts, by a clock that the backend moves as a real one would."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from serving.backends.base import FloatArray, IntArray
from serving.engine.config import EngineConfig
from serving.engine.prefill_budget import MIN_CHUNK_TOKENS, TimedPrefillBudget
from serving.errors import InputError
from tests.closed_form import greedy
from tests.serving.engine.harness import Heard, Stepped

Cost = Callable[[int, int], float]


def measured(tokens: int, start: int) -> float:
    """Milliseconds of a piece at 124M in int8, about (docs/benchmarks.md)."""
    return (3.3 + 0.13 * tokens) * (1 + start / 1200)


class Timed(Stepped):
    """An engine whose backend takes milliseconds: `cost` for a piece, `plain` for a decode step."""

    def __init__(self, cost: Cost, plain: float, **config: float) -> None:
        super().__init__(length=1024, chunk=None, **config)  # type: ignore[arg-type]
        self.cost, self.plain, self.slower = cost, plain, 1.0
        self.pieces: list[tuple[int, int]] = []
        prefill, decode = self.backend.prefill_chunk, self.backend.decode

        def prefill_chunk(slot: int, tokens: Sequence[int], start: int) -> FloatArray:
            self.now += self.slower * self.cost(len(tokens), start) / 1e3
            self.pieces.append((start, len(tokens)))
            return prefill(slot, tokens, start)

        def decode_rows(tokens: IntArray, lengths: IntArray) -> FloatArray:
            self.now += self.slower * self.plain / 1e3
            return decode(tokens, lengths)

        self.backend.prefill_chunk, self.backend.decode = prefill_chunk, decode_rows  # type: ignore[method-assign]

    def stream(self) -> Heard:
        heard, _ = self.submit([7], max_new_tokens=900, ignore_eos=True)
        for _ in range(10):
            self.engine.step()
        return heard

    def read(self, prompt: list[int]) -> tuple[list[tuple[int, int]], list[float]]:
        """The pieces of a prompt that comes now, and the steps' milliseconds."""
        self.pieces.clear()
        before = len(self.observed.steps)
        heard, _ = self.submit(prompt, max_new_tokens=3, ignore_eos=True)
        while heard.prompt is None:
            self.engine.step()
        steps = [step.seconds * 1e3 for step in self.observed.steps[before:]]
        self.run_until(heard)
        assert heard.ids() == greedy(prompt, 3, 257)
        return list(self.pieces), steps

    def run_until(self, heard: Heard) -> None:
        while not heard.done:
            self.engine.step()


PROMPT = list(range(225)) * 4


@pytest.mark.parametrize("slowdown", [2.5, 4.0])
def test_a_step_stays_within_the_bound_however_long_the_prompt_is_by_now(slowdown: float) -> None:
    engine = Timed(measured, 9.0, prefill_slowdown=slowdown)
    stream = engine.stream()
    pieces, steps = engine.read(PROMPT)
    # All that the bound leaves is used, but for the first piece, which finds out what a piece costs, and the last.
    assert pieces[0] == (0, MIN_CHUNK_TOKENS) and max(steps) <= slowdown * 9.0 * 1.11
    assert min(steps[3:-1]) >= slowdown * 9.0 * 0.9
    sizes = [tokens for _, tokens in pieces]
    assert sizes[2] > 1.5 * sizes[-2] > MIN_CHUNK_TOKENS
    # The next one begins where this one began, and with what is known by now.
    again, steps = engine.read(PROMPT[::-1])
    assert max(steps) <= slowdown * 9.0 * 1.1 and again[0][1] > 0.7 * sizes[2]
    engine.run_until(stream)
    assert stream.ids() == greedy([7], 900, 257)


def test_where_no_piece_is_short_enough_the_least_is_read() -> None:
    engine = Timed(measured, 2.0, prefill_slowdown=2.5)
    engine.stream()
    pieces, _ = engine.read(PROMPT)
    assert {tokens for _, tokens in pieces[:-1]} == {MIN_CHUNK_TOKENS}
    # Of several prompts each allows as much again, before anything is known and after.
    prefill_budget = TimedPrefillBudget(2.5, 512)
    for _ in range(2):
        assert [prefill_budget.tokens(0, prompts) for prompts in (1, 2, 3, 40)] == [
            MIN_CHUNK_TOKENS,
            2 * MIN_CHUNK_TOKENS,
            3 * MIN_CHUNK_TOKENS,
            512,
        ]
        prefill_budget.on_step_end(MIN_CHUNK_TOKENS, 0, 9.0, 0.1)


def test_a_step_that_costs_nothing_leaves_the_budget() -> None:
    engine = Timed(lambda tokens, start: 0.001, 6.0, max_num_batched_tokens=300)
    engine.stream()
    pieces, _ = engine.read(PROMPT)
    assert [tokens for _, tokens in pieces] == [MIN_CHUNK_TOKENS, 299, 299, 302 - MIN_CHUNK_TOKENS]


def test_prompts_that_wait_for_one_another_are_read_faster_but_not_those_that_wait_for_a_slot() -> None:
    engine = Timed(measured, 9.0, prefill_slowdown=2.5)  # of 4 slots
    engine.stream()
    engine.read(PROMPT)  # by now it is known what a piece costs
    prompts = [[token] * 200 for token in range(1, 9)]
    engine.pieces.clear()
    before = len(engine.observed.steps)
    waiting = [engine.submit(prompt, max_new_tokens=40, ignore_eos=True)[0] for prompt in prompts]
    for heard in waiting[:3]:
        while heard.prompt is None:
            engine.engine.step()
    first, second, third = (tokens for start, tokens in engine.pieces if start == 0)
    assert first > second > third
    steps = [step.seconds * 1e3 for step in engine.observed.steps[before:]]
    assert 9.0 * (1 + 1.5 * 2) < max(steps) <= 9.0 * (1 + 1.5 * 3) * 1.1
    engine.run_until(waiting[-1])
    assert [heard.ids() for heard in waiting] == [greedy(prompt, 40, 257) for prompt in prompts]


def test_another_load_is_noticed_and_a_single_disturbance_is_not() -> None:
    prefill_budget = TimedPrefillBudget(2.5, 512)

    def run(steps: int, piece: Cost, plain: float) -> int:
        for _ in range(steps):
            tokens = prefill_budget.tokens(100, 1)
            prefill_budget.on_step_end(tokens, 100, piece(tokens, 100), plain)
        return prefill_budget.tokens(100, 1)

    usual = run(30, measured, 12.0)
    assert measured(usual, 100) <= 1.5 * 12.0 < measured(usual + 1, 100) * 1.02
    assert run(1, lambda tokens, start: 90.0, 12.0) >= 0.8 * usual
    # Twice as slow, piece and step alike: the same pieces. Pieces alone: shorter ones.
    assert run(60, lambda tokens, start: 2 * measured(tokens, start), 24.0) == pytest.approx(usual, rel=0.04)
    assert run(60, lambda tokens, start: 2 * measured(tokens, start), 12.0) == pytest.approx(38, abs=1)
    # What a piece of another shape may have is found too.
    flat = run(500, lambda tokens, start: 5.0 + 0.03 * tokens, 12.0)
    assert flat == pytest.approx(433, rel=0.05)
    steep = run(100, lambda tokens, start: 0.5 * tokens, 12.0)
    assert steep == pytest.approx(36, abs=1)


@pytest.mark.parametrize("slowdown", [1.0, 1.3, 2.0, 5.0])
def test_wherever_prompts_are_cut_a_single_token_is_read_alone_only_where_it_always_is(slowdown: float) -> None:
    random = np.random.default_rng(3)
    engine = Timed(
        lambda tokens, start: float(random.uniform(0.5, 1.5)) * measured(tokens, start), 6.0, prefill_slowdown=slowdown
    )
    engine.stream()
    for length in range(1, 70):
        # Another first token each time, so that nothing is found in the cache.
        pieces, _ = engine.read([length] * length)
        ends = np.cumsum([tokens for _, tokens in pieces]).tolist()
        assert [start for start, _ in pieces] == [0, *ends[:-1]] and ends[-1] == length
        assert [start for start, tokens in pieces if tokens == 1] == ([length - 1] if length % 16 == 1 else [])


def test_settings_are_checked() -> None:
    for value in (0.9, 1001.0, True):
        with pytest.raises(InputError, match="prefill_slowdown"):
            EngineConfig(prefill_slowdown=value)
