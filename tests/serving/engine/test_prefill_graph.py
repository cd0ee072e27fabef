"""Prompts that another graph prefills: which graph wrote a position is a function of the request alone.

The model here answers by which graph wrote each position, so a position that the wrong one wrote changes tokens.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from serving.backends.base import FloatArray, IntArray
from serving.backends.verify_steps import CHAIN_STEP
from serving.engine.api import GenerationRequest
from serving.engine.config import SHARED_CHUNK, EngineConfig
from serving.engine.engine import SlotEngine
from serving.sampling import SamplingParams
from serving.sampling.constraints import Allowed
from tests.closed_form import ClosedFormSlotBackend
from tests.serving.engine.harness import EOS, TOKENIZER, Heard, Observed, Stepped

LENGTH = 160
FIRST, LETTERS, BANDS = 1, 13, 17
"""The model writes tokens of FIRST + letter + LETTERS * band: the letters repeat, and the band tells who wrote what."""
WRONG = 250
"""What it writes after a position of a prompt that follows a generated one."""
NOBODY, PREFILL, DECODE = 0, 1, 2
CHUNKS = (None, 2, 4, 8, 64)
PROMPT = tuple(FIRST + place % LETTERS for place in range(41))


def line(tokens: Sequence[int], makers: Sequence[int], maker: int) -> FloatArray:
    """The logits that `maker` gives after `tokens`, each of which was written by one of `makers`."""
    first = list(makers).index(DECODE) if DECODE in makers else len(makers)
    length, last = len(tokens), (tokens[-1] - FIRST) % LETTERS
    letter = (last * 5 if length % 23 == 7 else last + 1) % LETTERS
    likely = FIRST + letter + LETTERS * ((first + 5 * (maker == DECODE)) % BANDS)
    found = (-(np.arange(257) % 50) / 8 - 2).astype(np.float32)
    found[WRONG if PREFILL in makers[first:] else likely] = 0
    return found


def expected(prompt: Sequence[int], count: int) -> list[int]:
    """The greedy tokens after `prompt`, all of which the prefill graph writes, and the other graph what follows."""
    tokens, makers = list(prompt), [PREFILL] * len(prompt)
    tokens.append(int(line(tokens, makers, PREFILL).argmax()))
    while len(tokens) < len(prompt) + count:
        makers.append(DECODE)
        tokens.append(int(line(tokens, makers, DECODE).argmax()))
    return tokens[len(prompt) :]


class TwoGraphs(ClosedFormSlotBackend):
    """Remembers who wrote each position. Unlike its parent it trusts the engine, so that tokens tell of mistakes."""

    verify_step = CHAIN_STEP

    def __init__(self, slots: int, copies: bool = True, scored_tokens: int = 8) -> None:
        super().__init__(slots, LENGTH, 1, copies, scored_tokens=scored_tokens)
        self.makers = np.full((slots, LENGTH), NOBODY)

    def prefill_chunk(self, slot: int, tokens: Sequence[int], start: int) -> FloatArray:
        self._write(slot, tokens, start, PREFILL)
        return self._line(slot, start + len(tokens), PREFILL)

    def score_chunk(self, slot: int, tokens: Sequence[int], start: int) -> FloatArray:
        self._write(slot, tokens, start, PREFILL)
        return np.stack([self._line(slot, start + count, PREFILL) for count in range(1, len(tokens) + 1)])

    def verify(self, slot: int, tokens: Sequence[int], start: int) -> FloatArray:
        self._write(slot, tokens, start, DECODE)
        self.calls.append(("verify", len(tokens)))
        return np.stack([self._line(slot, start + count, DECODE) for count in range(1, len(tokens) + 1)])

    def decode(self, tokens: IntArray, lengths: IntArray) -> FloatArray:
        for row, (token, length) in enumerate(zip(tokens.tolist(), lengths.tolist(), strict=True)):
            self._write(row, [token], length, DECODE)
        return np.stack([self._line(row, length + 1, DECODE) for row, length in enumerate(lengths.tolist())])

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        super().copy_prefix(source, target, length)
        self.makers[target, :length] = self.makers[source, :length]

    def _write(self, slot: int, tokens: Sequence[int], start: int, maker: int) -> None:
        self._tokens[slot, start : start + len(tokens)] = tokens
        self.makers[slot, start : start + len(tokens)] = maker

    def _line(self, slot: int, length: int, maker: int) -> FloatArray:
        assert (self._tokens[slot, :length] >= 0).all(), "a position that was never written"
        return line(self._tokens[slot, :length].tolist(), self.makers[slot, :length].tolist(), maker)


class Mixed(Stepped):
    """The engine over such graphs."""

    def __init__(self, *, slots: int = 4, chunk: int | None = None, speculation: Any = "off", **backend: Any) -> None:
        self.backend: Any = TwoGraphs(slots, **backend)
        self.now = 0.0
        self.observed = Observed()
        settings = EngineConfig(slots=slots, prefill_chunk=chunk, speculation=speculation)
        self.engine = SlotEngine(
            self.backend, TOKENIZER, EOS, settings, self.observed, clock=lambda: self.now, start=False
        )

    def ask(self, prompt: Sequence[int], count: int, **fields: Any) -> Heard:
        heard, _ = self.submit(list(prompt), max_new_tokens=count, **fields)
        return heard

    def answer(self, prompt: Sequence[int], count: int, **fields: Any) -> Heard:
        heard = self.ask(prompt, count, **fields)
        self.run()
        self.check_idle()
        return heard


def test_the_model_tells_by_whom_a_position_was_written() -> None:
    """Otherwise no test here could fail."""
    right = [PREFILL] * 20 + [DECODE] * 10
    tokens = [*PROMPT[:20], *expected(PROMPT[:20], 10)]
    for place in range(30):
        wrong = [*right]
        wrong[place] = PREFILL + DECODE - wrong[place]
        found, wanted = (int(line(tokens, makers, DECODE).argmax()) for makers in (wrong, right))
        assert found != wanted, place
    found, wanted = (int(line(tokens, right, maker).argmax()) for maker in (PREFILL, DECODE))
    assert found != wanted


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("length", [1, 2, 16, 17, 33, 41])
def test_the_size_of_chunks_does_not_show(chunk: int | None, length: int) -> None:
    mixed = Mixed(chunk=chunk)
    company = mixed.ask([FIRST + 5] * 9, 60)  # A sequence decodes, so that chunks are small.
    for _ in range(4):
        mixed.engine.step()
    heard = mixed.ask(PROMPT[:length], 30)
    mixed.run()
    assert heard.ids() == expected(PROMPT[:length], 30) and company.ids() == expected([FIRST + 5] * 9, 60)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("copies", [True, False])
def test_a_cache_hit_does_not_show(chunk: int | None, copies: bool) -> None:
    mixed = Mixed(chunk=chunk, copies=copies)
    cached = []
    for length in (41, 41, 30, 20, 41):
        heard = mixed.answer(PROMPT[:length], 12)
        assert heard.prompt is not None and heard.ids() == expected(PROMPT[:length], 12)
        cached.append(heard.prompt.cached_tokens)
    assert cached[0] == 0 and all(cached[1:4])


@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_chats_own_answers_are_prefilled_again(chunk: int | None) -> None:
    """Each turn's prompt begins with the last prompt and what was generated after it."""
    mixed, prompt = Mixed(chunk=chunk, slots=2), PROMPT[:21]
    granularity = min(chunk or SHARED_CHUNK, SHARED_CHUNK)
    for _ in range(4):
        heard = mixed.answer(prompt, 18)
        assert heard.ids() == expected(prompt, 18)
        longer = (*prompt, *heard.ids(), *PROMPT[:7])
        again = mixed.answer(longer, 5)
        assert again.ids() == expected(longer, 5)
        assert again.prompt is not None
        assert again.prompt.cached_tokens == len(prompt) // granularity * granularity
        prompt = longer[: len(prompt) + 18]


def test_a_request_that_was_broken_off_and_is_asked_again_with_its_tokens() -> None:
    """The engine preempts nothing; a client that comes back with what it has is the nearest to it."""
    mixed = Mixed(slots=2)
    heard, handle = mixed.submit(list(PROMPT[:20]), max_new_tokens=100)
    for _ in range(45):
        mixed.engine.step()
    handle.cancel()
    mixed.run()
    assert heard.ends[0].reason == "cancelled"
    longer = (*PROMPT[:20], *heard.ids()[:40])
    again = mixed.answer(longer, 20)
    assert again.prompt is not None and again.prompt.cached_tokens == 16
    assert again.ids() == expected(longer, 20)


def test_sequences_that_move_between_slots() -> None:
    mixed = Mixed(slots=6)
    heard = [mixed.ask(PROMPT[: 5 + place], 6 + 12 * place) for place in range(6)]
    longest = mixed.ask(PROMPT[:33], 70)
    mixed.run()
    for place, each in enumerate(heard):
        assert each.ids() == expected(PROMPT[: 5 + place], 6 + 12 * place)
    assert longest.ids() == expected(PROMPT[:33], 70)
    assert any(name == "copy" for name, _ in mixed.backend.calls)


@pytest.mark.parametrize("copies", [True, False])
def test_several_sequences_of_a_request(copies: bool) -> None:
    heard = Mixed(copies=copies).answer(PROMPT, 15, n=3)
    assert [heard.ids(index) for index in range(3)] == [expected(PROMPT, 15)] * 3


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("scored_tokens", [8, 0])
def test_scored_prompts(chunk: int | None, scored_tokens: int) -> None:
    """What follows a scored prompt is what follows it unscored; scores are the prefill graph's where it gives any."""
    mixed = Mixed(chunk=chunk, scored_tokens=scored_tokens)
    for _ in range(2):
        company = mixed.ask([FIRST + 3] * 4, 50)
        heard = mixed.answer(PROMPT, 10, prompt_logprobs=0)
        assert heard.ids() == expected(PROMPT, 10) and company.ids() == expected([FIRST + 3] * 4, 50)
        assert heard.prompt is not None and heard.prompt.logprobs is not None
        if scored_tokens:
            for place, scored in enumerate(heard.prompt.logprobs[1:], 1):
                logits = line(PROMPT[:place], [PREFILL] * place, PREFILL).astype(np.float64)
                wanted = logits[PROMPT[place]] - np.log(np.exp(logits).sum())
                assert scored is not None and scored.own == pytest.approx(wanted, abs=1e-5)
    assert mixed.answer(PROMPT, 1, prompt_only=True, prompt_logprobs=0).ids() == []
    assert mixed.answer(PROMPT, 10).ids() == expected(PROMPT, 10)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_verify_steps_write_for_the_graph_that_decodes(chunk: int | None) -> None:
    mixed = Mixed(chunk=chunk, speculation="auto")
    for prompt in (PROMPT, PROMPT[:25], PROMPT):
        heard = mixed.answer(prompt, 80)
        assert heard.ids() == expected(prompt, 80)
        longer = (*prompt, *heard.ids()[:30])
        assert mixed.answer(longer, 20).ids() == expected(longer, 20)
    stats = mixed.engine.stats()
    assert stats.accepted_prompt_tokens > 20 and stats.drafted_prompt_tokens > stats.accepted_prompt_tokens


class Everything:
    """A grammar that allows every token, and often takes longer to say so than a step waits."""

    done = slow = False

    def __init__(self) -> None:
        self.ready, self._computed = False, 0

    def start(self, ends: frozenset[int] = frozenset()) -> Everything:
        return Everything()

    def accept(self, token: int) -> None:
        self.ready = False

    def compute(self) -> None:
        self._computed += 1
        time.sleep(0.005 * (self._computed % 3))
        self.ready = True

    def allowed(self) -> Allowed:
        if not self.ready:
            self.compute()
        return Allowed.of(np.ones(257, np.bool_))


def test_sequences_that_wait_for_the_masks_of_a_grammar() -> None:
    mixed = Mixed(speculation="auto")
    company = mixed.ask(PROMPT[:9], 50)
    heard = mixed.answer(PROMPT, 30, grammar=Everything(), n=2)
    assert [heard.ids(0), heard.ids(1), company.ids()] == [expected(PROMPT, 30)] * 2 + [expected(PROMPT[:9], 50)]


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("speculation", ["off", "auto"])
def test_alone_is_in_company(copies: bool, speculation: str) -> None:
    """Random requests that begin alike, come, are broken off, and come again with what was generated."""
    cached = 0
    for seed in range(6):
        source = random.Random(seed)
        mixed = Mixed(slots=5, chunk=source.choice(CHUNKS), copies=copies, speculation=speculation)
        known: list[tuple[int, ...]] = [PROMPT]
        asked: list[tuple[Heard, Any]] = []
        for _ in range(25):
            begin = source.choice(known)
            prompt = (*begin[: source.randint(1, len(begin))], *PROMPT[: source.randint(0, 9)])[: LENGTH - 40]
            params = SamplingParams(max_new_tokens=source.randint(1, 30), ignore_eos=True)
            scores = source.choice([None, None, 0])
            heard = Heard(GenerationRequest(prompt, params, n=source.randint(1, 2), prompt_logprobs=scores))
            asked.append((heard, mixed.engine.submit(heard.request, heard)))
            for _ in range(source.randint(0, 12)):
                mixed.engine.step()
            if source.random() < 0.2:
                source.choice(asked)[1].cancel()
            begun = source.choice(asked)[0]
            known.append((*begun.request.prompt, *(begun.ids() if begun.tokens else ())))
        mixed.run()
        for heard, _ in asked:
            cached += heard.prompt is not None and heard.prompt.cached_tokens > 0
            wanted = expected(heard.request.prompt, 30)
            for index in range(heard.request.n):
                ids = heard.ids(index)
                assert ids == wanted[: len(ids)]
                assert heard.ends[index].reason == "cancelled" or len(ids) == heard.request.params.max_new_tokens
    assert cached > 10
