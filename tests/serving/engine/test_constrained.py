"""Sequences with a grammar in the engine: their batch-mates, masks that come late, and errors that are their own."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.backends.base import FloatArray
from serving.bundle import open_bundle
from serving.engine.api import GenerationRequest
from serving.engine.engine import open_engine
from serving.engine.mask_worker import SLOW, MaskWorker
from serving.generation import stream
from serving.sampling import SamplingParams, constraints
from serving.sampling.constraints import Allowed, ConstraintError, StructuredOutput
from serving.sampling.grammars import GrammarCompiler
from tests.closed_form import ClosedFormBackend, greedy
from tests.serving.engine.harness import EOS, TOKENIZER, Heard, Stepped

COMPILER = GrammarCompiler(TOKENIZER, 257, EOS)


def regex(pattern: str) -> Any:
    return COMPILER.compile(StructuredOutput("regex", pattern))


class Held:
    """A constraint of even ids that is whole after `length` tokens; its masks wait for `gate`."""

    def __init__(self, gate: threading.Event, length: int, fails: bool = False) -> None:
        self.gate, self.length, self.fails = gate, length, fails
        self.ready, self.done, self.slow = True, False, False
        self.tokens: list[int] = []
        self.computed = 0

    def start(self, ends: frozenset[int] = frozenset()) -> Held:
        return self

    def accept(self, token: int) -> None:
        self.tokens.append(token)
        self.ready, self.done = False, len(self.tokens) == self.length

    def compute(self) -> None:
        if not self.ready:
            assert self.gate.wait(30)
            self.computed += 1
            self.ready = True

    def allowed(self) -> Allowed:
        self.compute()
        if self.fails and self.tokens:
            raise ConstraintError("the grammar cannot go on")
        return Allowed.of(np.arange(257) % 2 == 0)


def step_until(engine: Stepped, condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        engine.engine.step()
    raise AssertionError("it did not come to that")


def test_batch_mates_have_the_same_tokens_with_and_without_one() -> None:
    def run(with_grammar: bool) -> list[list[int]]:
        engine = Stepped(slots=6)
        mates = [
            engine.submit([9 + i], temperature=1.0, seed=i, max_new_tokens=40, ignore_eos=True)[0] for i in range(4)
        ]
        if with_grammar:
            guided, _ = engine.submit([1], temperature=1.0, max_new_tokens=40, grammar=regex("[ab]{3}c*"), n=2)
        engine.run()
        if with_grammar:
            assert all(re.fullmatch("[ab]{3}c*", guided.text(index)) for index in range(2))
        return [mate.ids() for mate in mates]

    assert run(True) == run(False)


def test_each_sequence_of_a_request_has_its_own_matcher() -> None:
    engine = Stepped()
    heard, _ = engine.submit([1, 2], temperature=30.0, seed=4, max_new_tokens=30, grammar=regex("[a-z]{8}"), n=4)
    engine.run()
    assert all(re.fullmatch("[a-z]{8}", heard.text(index)) for index in range(4))
    assert len({heard.text(index) for index in range(4)}) == 4
    assert [heard.ends[index].stopped_by for index in range(4)] == [None] * 4


def test_an_engine_and_stream_choose_the_same_tokens() -> None:
    for seed in range(5):
        params = SamplingParams(temperature=1.0, seed=seed, max_new_tokens=30, frequency_penalty=1.0)
        engine = Stepped()
        heard, _ = engine.submit([3, 4, 5], params=params, grammar=regex("(ab?c){2,7}"))
        engine.run()
        constraint = regex("(ab?c){2,7}").start()
        assert list(stream(ClosedFormBackend(), [3, 4, 5], params, EOS, constraint=constraint)) == heard.ids()
        assert re.fullmatch("(ab?c){2,7}", heard.text().rstrip())


def test_log_probabilities_are_among_the_allowed_tokens() -> None:
    engine = Stepped()
    heard, _ = engine.submit([1], temperature=1.0, grammar=regex("[abc]"), logprobs=5, max_new_tokens=2)
    engine.run()
    (event,) = heard.tokens[0]
    assert event.logprobs is not None
    assert sorted(token for token, _ in event.logprobs.top) == sorted(TOKENIZER.encode("abc").ids)
    assert sum(np.exp(nats) for _, nats in event.logprobs.top) == pytest.approx(1)
    assert dict(event.logprobs.top)[event.token_id] == event.logprobs.own


def test_nobody_waits_for_a_mask_that_is_late() -> None:
    gate = threading.Event()
    engine = Stepped()
    mate, _ = engine.submit([9], max_new_tokens=40, ignore_eos=True)
    held, _ = engine.submit([1], max_new_tokens=30, grammar=Held(gate, 5))
    step_until(engine, lambda: mate.done)
    assert mate.ids() == greedy([9], 40, 257)
    assert len(held.ids()) == 1 and engine.engine.stats().active_slots == 1
    gate.set()
    engine.run()
    assert len(held.ids()) == 5 and all(token % 2 == 0 for token in held.ids())
    assert (held.ends[0].reason, held.ends[0].stopped_by) == ("stop", None)
    engine.check_idle()


def test_tokens_do_not_depend_on_whether_masks_come_late() -> None:
    def run(late: bool) -> list[int]:
        gate = threading.Event()
        engine = Stepped()
        mate, _ = engine.submit([9], max_new_tokens=20, ignore_eos=True)
        held, _ = engine.submit([1], temperature=1.0, max_new_tokens=30, grammar=Held(gate, 12))
        if late:
            step_until(engine, lambda: mate.done)
        gate.set()
        engine.run()
        return held.ids()

    assert run(True) == run(False)


def test_a_late_sequence_can_be_cancelled_and_its_slot_is_free() -> None:
    gate = threading.Event()
    engine = Stepped(slots=1)
    held, handle = engine.submit([1], max_new_tokens=30, grammar=Held(gate, 5))
    step_until(engine, lambda: bool(held.tokens))
    for _ in range(3):
        engine.engine.step()
    handle.cancel()
    engine.engine.step()
    assert held.ends[0].reason == "cancelled"
    engine.check_idle()
    after, _ = engine.submit([9], max_new_tokens=3, ignore_eos=True)
    engine.run()
    gate.set()
    assert after.ids() == greedy([9], 3, 257)


def test_a_grammar_that_cannot_go_on_ends_its_own_sequence_alone() -> None:
    gate = threading.Event()
    gate.set()
    engine = Stepped()
    mate, _ = engine.submit([9], max_new_tokens=20, ignore_eos=True)
    failing, _ = engine.submit([1], max_new_tokens=30, grammar=Held(gate, 9, fails=True))
    engine.run()
    end = failing.ends[0]
    assert (end.reason, end.message, end.by_request) == ("error", "the grammar cannot go on", True)
    assert mate.ids() == greedy([9], 20, 257) and mate.ends[0].reason == "length"
    engine.check_idle()


def test_an_allowed_set_that_min_tokens_empties_is_the_requests_own_error() -> None:
    engine = Stepped()
    ends = TOKENIZER.encode("a").ids[0]
    heard, _ = engine.submit([1], grammar=regex("ab"), max_new_tokens=9, min_tokens=5, stop_token_ids=[ends])
    engine.run()
    assert heard.ends[0].by_request and "min_tokens" in heard.ends[0].message


def test_a_prompt_that_is_scored_first_and_one_with_a_cached_prefix() -> None:
    engine = Stepped()
    prompt = list(range(1, 26))
    for fields in ({"prompt_logprobs": 2}, {}, {}):
        heard, _ = engine.submit(prompt, temperature=1.0, max_new_tokens=9, grammar=regex("x{2}y"), **fields)
        engine.run()
        assert heard.text() == "xxy" and heard.ends[0].reason == "stop"
    assert heard.prompt is not None and heard.prompt.cached_tokens > 0


def test_a_broken_model_is_no_fault_of_the_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Stepped()

    def broken(slot: int, length: int) -> FloatArray:
        return np.full(257, np.nan, np.float32)

    monkeypatch.setattr(engine.backend, "_logits", broken)
    heard, _ = engine.submit([1], grammar=regex("ab"), max_new_tokens=9)
    engine.run()
    assert heard.ends[0].reason == "error" and not heard.ends[0].by_request and "finite" in heard.ends[0].message


def test_a_slow_mask_moves_to_the_other_thread_and_quick_ones_do_not_wait() -> None:
    worker = MaskWorker()
    gate, open_gate = threading.Event(), threading.Event()
    open_gate.set()
    slow, quick = Held(gate, 99), Held(open_gate, 99)
    for each in (slow, quick):
        each.accept(2)
    slow.slow = True
    worker.start([slow, quick])
    worker.wait([quick], 30)
    assert quick.ready and not slow.ready
    worker.wait([slow, quick], 0.01)
    assert not slow.ready
    timer = threading.Timer(2 * SLOW, gate.set)
    timer.start()
    worker.wait([slow], 30, every=False)
    assert slow.ready and slow.slow and not quick.slow
    worker.close()


@pytest.mark.parametrize("chooses", [False, True])
def test_on_a_real_graph_mates_are_untouched_and_texts_follow(
    real_bundle: Path, supports_device_sampling: bool
) -> None:
    bundle = open_bundle(real_bundle)
    engine = open_engine(bundle, "ort/fp32")
    if supports_device_sampling:
        from serving.engine.config import EngineConfig
        from serving.engine.engine import SlotEngine
        from serving.engine.onnx_slot_backend import OnnxSlotBackend

        engine.close()
        backend = OnnxSlotBackend(bundle, "ort/fp32", slots=4, max_length=48, supports_device_sampling=True)
        engine = SlotEngine(backend, TOKENIZER, EOS, EngineConfig(slots=4))

    def run(guided: bool) -> list[list[int]]:
        params = SamplingParams(temperature=1.0, seed=3, max_new_tokens=20, ignore_eos=True)
        requests = [GenerationRequest((7, 8, index), params) for index in range(2)]
        if guided:
            requests.append(GenerationRequest((5, 6), params, n=2, grammar=regex("[0-9]{4}(-[0-9]{2}){2}")))
        heard = [Heard(request) for request in requests]
        done = threading.Event()

        def listener(each: Heard) -> Callable[[Any], None]:
            def listen(event: Any) -> None:
                each(event)
                if all(one.done for one in heard):
                    done.set()

            return listen

        for each in heard:
            engine.submit(each.request, listener(each))
        assert done.wait(60)
        if guided:
            assert all(re.fullmatch(r"\d{4}(-\d\d){2}", heard[2].text(index)) for index in range(2))
        return [each.ids() for each in heard[:2]]

    try:
        assert run(True) == run(False)
    finally:
        engine.close()


def test_many_allowed_tokens_are_sampled_as_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two ways to restrict a row give the same tokens and log-probabilities, with penalties too."""

    def run() -> list[Any]:
        engine = Stepped()
        fields = {"repetition_penalty": 1.3, "logit_bias": {70: 5.0}, "presence_penalty": 0.5, "min_tokens": 3}
        heard = [
            engine.submit(
                [1, 2], temperature=t, seed=5, max_new_tokens=20, grammar=regex("[^a-m]+"), logprobs=4, **fields
            )[0]
            for t in (0.0, 1.0, 20.0)
        ]
        engine.run()
        return [(each.ids(), [event.logprobs for event in each.tokens[0]]) for each in heard]

    few = run()
    monkeypatch.setattr(constraints, "FEW", 0)
    many = run()
    assert [ids for ids, _ in few] == [ids for ids, _ in many]
    for (_, some), (_, others) in zip(few, many, strict=True):
        for one, other in zip(some, others, strict=True):
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
            assert one.own == pytest.approx(other.own, abs=1e-9)
