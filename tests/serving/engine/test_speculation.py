"""Speculative decoding gives the tokens of plain decoding, whatever a verify step's last bits are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from prometheus_client import generate_latest

from serving.backends.base import FloatArray, IntArray
from serving.backends.verify_steps import FP32_STEP
from serving.engine.config import EngineConfig
from serving.engine.engine import SlotEngine
from serving.errors import InputError
from serving.sampling import SamplingParams
from serving.sampling.constraints import StructuredOutput
from serving.sampling.grammars import GrammarCompiler
from serving.server.metrics import Metrics
from tests.closed_form import ClosedFormSlotBackend
from tests.serving.engine.harness import EOS, TOKENIZER, Heard, Observed, Stepped

TOLERANCE = 1e-3
LENGTH = 256
FIRST, LETTERS = 64, 12
"""Ids of the letters a to l."""


class RepetitiveBackend(ClosedFormSlotBackend):
    """A model whose texts repeat, with surprises, and with near ties that a verify step's noise turns round.

    A row that was written by a verify step, or after such a row, is inexact: its logits are off by up to TOLERANCE.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.inexact = np.zeros((self.slots, self.max_length), bool)
        self.verified: list[int] = []

    def prefill_chunk(self, slot: int, tokens: Sequence[int], start: int) -> FloatArray:
        self.inexact[slot, start : start + len(tokens)] = False
        return super().prefill_chunk(slot, tokens, start)

    def verify(self, slot: int, tokens: Sequence[int], start: int) -> FloatArray:
        self._call("verify", len(tokens))
        assert self.verify_step is not None and 1 < len(tokens) <= self.verify_step.tokens
        assert start + len(tokens) <= self.max_length
        self.verified.append(len(tokens))
        places = slice(start, start + len(tokens))
        self._tokens[slot, places], self._read[slot, places] = tokens, False
        self.inexact[slot, places] = self.verify_step.tolerance != 0
        return np.stack([self._logits(slot, start + count + 1) for count in range(len(tokens))])

    def decode(self, tokens: IntArray, lengths: IntArray) -> FloatArray:
        for row, length in enumerate(lengths.tolist()):
            self.inexact[row, length] = self.inexact[row, :length].any()
        return super().decode(tokens, lengths)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        super().copy_prefix(source, target, length)
        self.inexact[target, :length] = self.inexact[source, :length]

    def _logits(self, slot: int, length: int) -> FloatArray:
        tokens = self._tokens[slot, :length]
        assert (tokens >= 0).all()
        last = (int(tokens[-1]) - FIRST) % LETTERS
        likely = (last * 5 + 3) % LETTERS if length % 23 == 7 else (last + 1) % LETTERS
        line = np.full(self.vocab_size, -30, np.float32)
        line[FIRST : FIRST + LETTERS] = -((np.arange(LETTERS) - likely) % LETTERS) / 2
        if length % 9 == 0:
            line[FIRST + (likely + 1) % LETTERS] = -TOLERANCE / 8
        if self.inexact[slot, :length].any():
            line += np.sin(np.arange(self.vocab_size) * 7.0 + length).astype(np.float32) * np.float32(TOLERANCE * 0.99)
        return line


class Speculating(Stepped):
    """The engine over such a model, which speculates unless it is told not to."""

    def __init__(
        self, *, slots: int = 4, speculation: Any = "auto", tolerance: float | None = TOLERANCE, table: Any = None
    ) -> None:
        self.backend = RepetitiveBackend(slots, LENGTH, 8)
        self.backend.verify_step = None if tolerance is None else replace(FP32_STEP, tolerance=tolerance)
        self.now = 0.0
        self.observed = Observed()
        settings = EngineConfig(slots=slots, prefill_chunk=8, speculation=speculation)
        self.engine = SlotEngine(
            self.backend, TOKENIZER, EOS, settings, self.observed, clock=lambda: self.now, start=False, table=table
        )


PROMPT = [FIRST + place % LETTERS for place in range(30)]
PARAMETERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 0.4, "top_k": 5, "seed": 4},
    {"temperature": 0.6, "top_p": 0.7, "min_p": 0.01, "seed": 5},
    {"frequency_penalty": 0.2, "repetition_penalty": 1.1},
    {"temperature": 0.5, "presence_penalty": 0.5, "logit_bias": ((67, 1.5),), "seed": 6},
]


def finished(run: Speculating, prompt: list[int] = PROMPT, **fields: Any) -> Heard:
    heard, _ = run.submit(prompt, **fields)
    run.run()
    run.check_idle()
    return heard


def said(heard: Heard) -> list[tuple[Any, ...]]:
    return [
        (heard.ids(index), heard.text(index), heard.ends[index].reason, heard.ends[index].stopped_by)
        for index in range(heard.request.n)
    ]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("tolerance", [0.0, TOLERANCE])
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_tokens_equal_plain_decoding(parameters: dict[str, Any], tolerance: float) -> None:
    run = Speculating(tolerance=tolerance)
    plain = Speculating(speculation="off")
    for seed in range(3):
        fields = {"max_new_tokens": 100, **parameters, "seed": seed}
        assert said(finished(run, **fields)) == said(finished(plain, **fields))
    stats = run.engine.stats()
    assert stats.accepted_prompt_tokens > 5 and stats.drafted_prompt_tokens >= stats.accepted_prompt_tokens
    assert not plain.backend.verified and plain.engine.stats().drafted_prompt_tokens == 0
    assert (stats.replayed_tokens == 0) if not tolerance else True


def test_greedy_needs_fewer_steps() -> None:
    run, plain = Speculating(tolerance=0.0), Speculating(speculation="off")
    finished(run, max_new_tokens=200)
    finished(plain, max_new_tokens=200)
    assert run.engine.stats().steps < 0.5 * plain.engine.stats().steps
    assert run.engine.stats().generated_tokens == plain.engine.stats().generated_tokens == 200


@pytest.mark.usefixtures("eager")
def test_an_uncertain_token_is_sampled_after_exact_positions_only() -> None:
    run = Speculating()
    finished(run, max_new_tokens=150)
    assert run.engine.stats().replayed_tokens > 0


@pytest.mark.usefixtures("eager")
def test_without_replays_the_noise_does_change_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise of the model above is large enough to be noticed."""
    monkeypatch.setattr("serving.engine.speculation.is_certain", lambda *_: True)
    run, plain = Speculating(), Speculating(speculation="off")
    assert said(finished(run, max_new_tokens=150)) != said(finished(plain, max_new_tokens=150))


@pytest.mark.usefixtures("eager")
def test_in_company() -> None:
    """Others come and go in the middle, in other slots; the ones that run together do not speculate."""
    results = []
    for speculation in ("auto", "off"):
        run = Speculating(speculation=speculation)
        first, _ = run.submit(PROMPT, max_new_tokens=150)
        run.run(20)
        second, _ = run.submit(PROMPT[5:], max_new_tokens=40, temperature=0.7, seed=9)
        run.run(20)
        third, _ = run.submit(PROMPT[3:], max_new_tokens=30, n=2, temperature=0.9, seed=1)
        run.run()
        results.append([said(each) for each in (first, second, third)])
        if speculation == "auto":
            assert run.backend.verified
    assert results[0] == results[1]


def test_only_a_sequence_that_runs_alone_speculates() -> None:
    run = Speculating()
    finished(run, max_new_tokens=1)
    heard, _ = run.submit(PROMPT, max_new_tokens=60, n=2)
    while run.engine.step():
        if len(heard.ends) == 0 and heard.tokens[0] and heard.tokens[1]:
            assert not run.backend.verified


@pytest.mark.usefixtures("eager")
def test_logprobs_come_with_every_token() -> None:
    run, plain = Speculating(), Speculating(speculation="off")
    fields: dict[str, Any] = {"max_new_tokens": 80, "logprobs": 2, "frequency_penalty": 0.1}
    ours, theirs = finished(run, **fields), finished(plain, **fields)
    assert said(ours) == said(theirs)
    for one, other in zip(ours.tokens[0], theirs.tokens[0], strict=True):
        assert one.logprobs is not None and other.logprobs is not None
        assert one.logprobs.own == pytest.approx(other.logprobs.own, abs=4 * TOLERANCE)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("stop", ["defg", "c", "lab"])
def test_a_stop_text_inside_a_draft(stop: str) -> None:
    ends = [finished(Speculating(speculation=each), max_new_tokens=100, stop=(stop,)) for each in ("auto", "off")]
    assert said(ends[0]) == said(ends[1])
    assert ends[0].ends[0].reason == "stop"


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_the_last_token_inside_a_draft(count: int) -> None:
    ends = [finished(Speculating(speculation=each), max_new_tokens=count) for each in ("auto", "off")]
    assert said(ends[0]) == said(ends[1]) and len(ends[0].ids()) == count


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("room", range(1, 12))
def test_the_end_of_the_context_inside_a_draft(room: int) -> None:
    prompt = [FIRST + place % LETTERS for place in range(LENGTH - room)]
    ends = [finished(Speculating(speculation=each), prompt, max_new_tokens=500) for each in ("auto", "off")]
    assert said(ends[0]) == said(ends[1]) and len(ends[0].ids()) == room


@pytest.mark.usefixtures("eager")
def test_cancellation_in_the_middle_frees_the_slot_and_its_prefix_is_reused() -> None:
    run, plain = Speculating(), Speculating(speculation="off")
    heard, handle = run.submit(PROMPT, max_new_tokens=200)
    while not run.backend.verified or len(heard.ids()) < 60:
        assert run.engine.step()
    handle.cancel()
    run.run()
    run.check_idle()
    assert heard.ends[0].reason == "cancelled"
    again = finished(run, max_new_tokens=100)
    assert again.prompt is not None and again.prompt.cached_tokens == 24
    assert said(again) == said(finished(plain, max_new_tokens=100))


def test_a_prompt_that_is_complete_after_a_copy_begins_beside_a_draft() -> None:
    """The last step of its prefill copies the prompt to its second slot and reads no token."""
    run, plain = Speculating(slots=3), Speculating(slots=3, speculation="off")
    results = []
    for each in (run, plain):
        first, _ = each.submit(PROMPT, max_new_tokens=150)
        for _ in range(20):
            each.engine.step()
        both, _ = each.submit(PROMPT[:20], n=2, max_new_tokens=20)
        each.run()
        each.check_idle()
        results.append([said(first), said(both)])
    assert results[0] == results[1] and run.backend.verified


def test_a_failing_verify_step_ends_its_request_only() -> None:
    run = Speculating()
    heard, _ = run.submit(PROMPT, max_new_tokens=100)
    while not run.backend.verified:
        assert run.engine.step()
    run.backend.fails.append("verify")
    run.run()
    run.check_idle()
    assert heard.ends[0].reason == "error"
    assert said(finished(run, max_new_tokens=50)) == said(finished(Speculating(speculation="off"), max_new_tokens=50))


def test_a_sequence_with_a_grammar_decodes_plainly() -> None:
    grammar = GrammarCompiler(TOKENIZER, 257, EOS).compile(StructuredOutput("regex", "[a-l]{40}"))
    run, plain = Speculating(), Speculating(speculation="off")
    ours = finished(run, max_new_tokens=60, grammar=grammar)
    assert len(ours.text()) == 40 and not run.backend.verified
    assert said(ours) == said(finished(plain, max_new_tokens=60, grammar=grammar))


@pytest.mark.usefixtures("eager")
def test_metrics_count_drafts_by_source() -> None:
    run, metrics = Speculating(), Metrics()
    finished(run, max_new_tokens=20)
    metrics.model("model", 1).begin(run.engine)
    before = run.engine.stats()
    finished(run, max_new_tokens=150)
    stats = run.engine.stats()
    text = generate_latest(metrics.registry).decode()
    drafted = stats.drafted_prompt_tokens - before.drafted_prompt_tokens
    accepted = stats.accepted_prompt_tokens - before.accepted_prompt_tokens
    replayed = stats.replayed_tokens - before.replayed_tokens
    assert 0 < accepted < drafted and replayed > 0
    prefix = "gpt2_bundle_spec_decode_"
    for source, values in {"prompt": (drafted, accepted), "ngram": (0, 0)}.items():
        for name, value in zip(("draft", "accepted"), values, strict=True):
            labels = f'{{model_name="model",source="{source}",version="1"}}'
            assert f"{prefix}num_{name}_tokens_total{labels} {float(value)}" in text
    assert f'{prefix}replayed_tokens_total{{model_name="model",version="1"}} {float(replayed)}' in text


def test_a_table_drafts_where_the_text_does_not_repeat() -> None:
    class Table:
        def continuation(self, tokens: Sequence[int], count: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
            drafted = [FIRST + (tokens[-1] - FIRST + 1 + place) % LETTERS for place in range(count)]
            return tuple(drafted), (0.9,) * count

    run, plain = Speculating(tolerance=0.0, table=Table()), Speculating(speculation="off")
    assert said(finished(run, [FIRST], max_new_tokens=40)) == said(finished(plain, [FIRST], max_new_tokens=40))
    assert run.engine.stats().accepted_ngram_tokens > 10


def test_a_backend_whose_tolerance_is_not_known_does_not_speculate() -> None:
    run = Speculating(tolerance=None)
    finished(run, max_new_tokens=60)
    assert not run.backend.verified


def test_the_setting() -> None:
    with pytest.raises(InputError, match="speculation is 'fast'"):
        EngineConfig(speculation="fast")  # type: ignore[arg-type]


def test_a_prompt_of_one_repeated_token_is_indexed_in_time_linear_in_its_length() -> None:
    from serving.generation.drafts import Drafter
    from serving.generation.pacing import Pacing

    def seconds(length: int) -> float:
        times = []
        for _ in range(3):
            drafter, began = Drafter(8, Pacing(FP32_STEP).pace(SamplingParams())), time.perf_counter()
            drafter.extend([7] * length)
            for _ in range(length):
                assert drafter.draft(7) is not None
                drafter.extend([7])
            times.append(time.perf_counter() - began)
        return min(times)

    assert seconds(2048) < 12 * seconds(512) and seconds(1024) < 1
