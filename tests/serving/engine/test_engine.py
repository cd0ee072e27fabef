"""Requests' ends: stops, limits, deadlines, cancels, failures; and what is refused."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from serving.engine.api import DrainingError, Event, FinishEvent, GenerationRequest, QueueFullError
from serving.engine.config import EngineConfig
from serving.engine.engine import SlotEngine
from serving.engine.sampler import log_probabilities
from serving.errors import InputError
from serving.sampling import SamplingParams
from tests.closed_form import ClosedFormSlotBackend, greedy, logits_after
from tests.serving.engine.harness import EOS, TOKENIZER, Heard, Stepped, wanted


def test_events_say_why_a_continuation_ended() -> None:
    engine = Stepped()
    tokens = greedy([1, 2], 10, 257)
    text = TOKENIZER.decode(tokens[:8])
    cases: list[tuple[dict[str, Any], tuple[str, Any, int]]] = [
        ({"max_new_tokens": 5}, ("length", None, 5)),
        ({"max_new_tokens": 99}, ("length", None, 62)),
        ({"stop_token_ids": (tokens[4],)}, ("stop", tokens[4], 5)),
        ({"stop_token_ids": (tokens[1],), "min_tokens": 1, "max_new_tokens": 4}, ("stop", tokens[1], 2)),
    ]
    for fields, (reason, stopped_by, count) in cases:
        heard, _ = engine.submit([1, 2], **{"ignore_eos": True, **fields})
        engine.run()
        end = heard.ends[0]
        assert (end.reason, end.stopped_by, len(heard.ids())) == (reason, stopped_by, count)
    stop = next(character for character in text if ord(character) < 128)
    heard, _ = engine.submit([1, 2], stop=("never", stop), ignore_eos=True)
    engine.run()
    assert heard.ends[0].stopped_by == stop and heard.text() == text[: text.index(stop)]
    ended, _ = engine.submit([1, 2], logit_bias={EOS: 100.0})
    engine.run()
    assert ended.ends[0].stopped_by == EOS and ended.ids() == [EOS] and ended.text() == ""


def test_a_stop_token_is_not_chosen_before_min_tokens() -> None:
    engine = Stepped()
    first = greedy([1, 2], 1, 257)[0]
    heard, _ = engine.submit([1, 2], stop_token_ids=(first,), min_tokens=3, max_new_tokens=8, ignore_eos=True)
    engine.run()
    assert first not in heard.ids()[:3] and heard.ids() == wanted(heard.request, 0)[0]


def test_log_probabilities_are_those_of_the_models_own_logits() -> None:
    engine = Stepped()
    heard, _ = engine.submit(
        [3, 4, 5], logprobs=2, prompt_logprobs=1, max_new_tokens=3, logit_bias={9: 50.0}, repetition_penalty=1.5
    )
    engine.run()
    tokens = [3, 4, 5]
    exact = lambda ids: (lambda x: x - np.log(np.exp(x).sum()))(logits_after(ids, 257).astype(np.float64))  # noqa: E731
    assert heard.prompt is not None and heard.prompt.logprobs is not None and heard.prompt.logprobs[0] is None
    for place in (1, 2):
        found = heard.prompt.logprobs[place]
        assert found is not None and found.own == pytest.approx(exact(tokens[:place])[tokens[place]], abs=1e-6)
        assert [token for token, _ in found.top] == [int(exact(tokens[:place]).argmax())]
    for event in heard.tokens[0]:
        logs = exact(tokens)
        assert event.logprobs is not None and event.logprobs.own == pytest.approx(logs[event.token_id], abs=1e-6)
        assert [token for token, _ in event.logprobs.top] == np.argsort(-logs, kind="stable")[:2].tolist()
        tokens.append(event.token_id)
    equal = log_probabilities(np.zeros(5, np.float32), 4, 3)
    assert [token for token, _ in equal.top] == [0, 1, 2] and equal.own == pytest.approx(-np.log(5))


def test_a_deadline_ends_who_runs_and_who_waits() -> None:
    engine = Stepped(slots=1, default_timeout=30.0)
    runs, _ = engine.submit([1], timeout=5.0, max_new_tokens=60, ignore_eos=True)
    waits, _ = engine.submit([2], timeout=3.0)
    by_default, _ = engine.submit([3], max_new_tokens=60, ignore_eos=True)
    for _ in range(3):
        engine.now += 1
        engine.engine.step()
    assert waits.ends[0].reason == "timeout" and waits.prompt is None and not runs.done
    assert "time limit" in waits.ends[0].message
    engine.now += 2
    engine.engine.step()
    assert runs.ends[0].reason == "timeout" and by_default.prompt is not None, "its slot was free at once"
    engine.now = 31
    engine.engine.step()
    assert by_default.ends[0].reason == "timeout"
    engine.check_idle()


def test_a_cancel_frees_the_slot_in_the_next_step_wherever_the_request_is() -> None:
    engine = Stepped(slots=1, length=256, max_num_batched_tokens=8)
    for steps in (0, 1, 2, 3, 20):
        heard, handle = engine.submit(list(range(20)), max_new_tokens=200, ignore_eos=True, prompt_logprobs=steps % 2)
        for _ in range(steps):
            engine.engine.step()
        handle.cancel()
        handle.cancel()
        other, _ = engine.submit([4], max_new_tokens=1)
        engine.engine.step()
        assert heard.ends[0].reason == "cancelled" and other.done
        handle.cancel()
        engine.run()
        engine.check_idle()


@pytest.mark.parametrize("call", ["prefill", "decode", "copy"])
def test_a_failing_step_ends_those_it_was_for_and_nobody_else(call: str) -> None:
    engine = Stepped(slots=4)
    start = list(range(20))
    running, _ = engine.submit([*start, 1], max_new_tokens=30, ignore_eos=True)
    engine.engine.step()
    engine.backend.fails = [call]
    reading, _ = engine.submit([*start, 2], max_new_tokens=30, ignore_eos=True)
    waiting, _ = engine.submit([*start, 3], max_new_tokens=30, ignore_eos=True)
    engine.run()
    broken = {"prefill": reading, "copy": reading, "decode": running}[call]
    for heard in (running, reading, waiting):
        if heard is broken:
            assert heard.ends[0].reason == "error"
            assert heard.ends[0].message == f"the model failed: {call} broke here"
        else:
            assert (heard.ends[0].reason, heard.ids()) == ("length", greedy(list(heard.request.prompt), 30, 257))
    engine.check_idle()


def test_what_a_failing_step_wrote_is_not_taken_over() -> None:
    engine = Stepped(slots=1)
    cached = []
    for fails in ([], ["decode"], [], []):
        engine.backend.fails = fails
        heard, _ = engine.submit(list(range(20)), max_new_tokens=3, ignore_eos=True)
        engine.run()
        assert heard.prompt is not None and heard.ends[0].reason == ("error" if cached == [0] else "length")
        cached.append(heard.prompt.cached_tokens)
    assert cached == [0, 16, 0, 16]


def test_a_row_that_cannot_be_moved_goes_on_where_it_is() -> None:
    engine = Stepped(slots=2, length=128)
    first, handle = engine.submit([1] * 9, max_new_tokens=90, ignore_eos=True)
    second, _ = engine.submit([2], max_new_tokens=90, ignore_eos=True)
    while not second.tokens:
        engine.engine.step()
    handle.cancel()
    engine.backend.fails = ["copy", "copy"]
    engine.engine.step()
    again, _ = engine.submit([1] * 9, max_new_tokens=1)
    engine.run()
    assert second.ids() == greedy([2], 90, 257) and not engine.backend.fails and first.done
    assert again.prompt is not None and again.prompt.cached_tokens == 0, "its slot was to be written over"


def test_logits_that_are_no_numbers_end_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Stepped()
    good, _ = engine.submit([1], max_new_tokens=9, ignore_eos=True)
    bad, _ = engine.submit([2], max_new_tokens=9, ignore_eos=True)
    decode = engine.backend.decode

    def broken(tokens: Any, lengths: Any) -> Any:
        logits = decode(tokens, lengths)
        if len(logits) == 2 and lengths[1] == 3:
            logits[1] = np.nan
        return logits

    monkeypatch.setattr(engine.backend, "decode", broken)
    engine.run()
    assert good.ends[0].reason == "length" and bad.ends[0].reason == "error"
    assert "not a finite number after 4 tokens" in bad.ends[0].message


def test_a_listener_that_raises_loses_its_slots_and_nobody_elses() -> None:
    engine = Stepped()
    other, _ = engine.submit([5], max_new_tokens=20, ignore_eos=True)

    def listener(event: Event) -> None:
        raise ValueError("gone")

    engine.engine.submit(GenerationRequest((1, 2), SamplingParams(max_new_tokens=50, ignore_eos=True)), listener)
    engine.engine.step()
    engine.engine.step()
    assert engine.engine.stats().active_slots == 1
    engine.run()
    assert other.ids() == greedy([5], 20, 257)
    engine.check_idle()


def test_a_fault_of_the_engine_itself_loses_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Stepped()
    heard, _ = engine.submit([1], max_new_tokens=5)
    monkeypatch.setattr(engine.engine._core.scheduler, "rows", lambda: 1 / 0)
    engine.run()
    assert heard.ends[0].reason == "error"
    monkeypatch.undo()
    again, _ = engine.submit([1], max_new_tokens=5, ignore_eos=True)
    engine.run()
    assert again.ids() == greedy([1], 5, 257)


def test_what_can_never_be_served_is_refused_at_once() -> None:
    engine = Stepped(slots=2)
    for prompt, fields, message in [
        ([], {}, "the prompt is empty"),
        ([1] * 64, {}, "the prompt has 64 tokens.* context of 64; shorten it to 63"),
        ([257], {}, "the prompt has the token id 257"),
        ([1], {"logit_bias": {300: 1.0}}, "the logit_bias of the prompt has the token id 300"),
        ([1], {"stop_token_ids": [300]}, "the stop_token_ids of the prompt has the token id 300"),
        ([1], {"n": 3}, "n is 3, but this server decodes 2 sequences"),
    ]:
        with pytest.raises(InputError, match=message):
            engine.submit(prompt, **fields)
    engine.check_idle()


def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    engine = Stepped(slots=2, queue_limit=3)
    heard = [engine.submit([index], max_new_tokens=60, ignore_eos=True)[0] for index in range(5)]
    with pytest.raises(QueueFullError, match="5 requests are waiting") as caught:
        engine.submit([9])
    assert caught.value.retry_after == 1 and engine.engine.stats().waiting_requests == 5
    heard.append(engine.submit([10], max_new_tokens=1, joins_call=True)[0])
    for _ in range(4):
        engine.engine.step()
        engine.now += 1
    assert engine.engine.stats().waiting_requests == 4
    with pytest.raises(QueueFullError) as caught:
        engine.submit([9])
    assert 1 <= caught.value.retry_after <= 60
    engine.run()
    assert all(each.done for each in heard)
    engine.submit([9], max_new_tokens=1)
    engine.run()


def test_when_to_come_again_is_what_waits_by_the_rate_of_late() -> None:
    engine = Stepped(slots=2, queue_limit=0)
    prefill, decode = engine.backend.prefill_chunk, engine.backend.decode

    def slow(call: Any) -> Any:
        def two_seconds(*arguments: Any) -> Any:
            engine.now += 2
            return call(*arguments)

        return two_seconds

    engine.backend.prefill_chunk, engine.backend.decode = slow(prefill), slow(decode)  # type: ignore[method-assign]
    engine.submit([1], max_new_tokens=40, ignore_eos=True)
    engine.engine.step()
    for prompt, tokens, seconds in (([1, 2, 3], 4, 22), ([5], 2, 10), ([7] * 30, 20, 60)):
        _, handle = engine.submit(prompt, n=2, max_new_tokens=tokens)
        engine.engine.step()
        with pytest.raises(QueueFullError) as caught:
            engine.submit([9])
        assert caught.value.retry_after == seconds
        handle.cancel()
        engine.engine.step()
    steps = engine.observed.steps
    assert [step.inter_token for step in steps] == [()] + [(2.0,)] * (len(steps) - 1) and len(steps) > 3


def threaded(**config: Any) -> SlotEngine:
    settings = EngineConfig(slots=4, prefill_chunk=8, **config)
    return SlotEngine(ClosedFormSlotBackend(), TOKENIZER, EOS, settings)


def submit(engine: SlotEngine, prompt: list[int], **fields: Any) -> Heard:
    request = GenerationRequest(tuple(prompt), SamplingParams(**fields))
    heard = Heard(request)
    engine.submit(request, heard)
    return heard


def test_draining_ends_what_was_accepted_and_takes_nothing_new() -> None:
    engine = threaded()
    heard = [submit(engine, [index], max_new_tokens=40, ignore_eos=True) for index in range(9)]
    assert engine.drain(60) is True
    assert all(each.ids() == greedy([index], 40, 257) for index, each in enumerate(heard))
    with pytest.raises(DrainingError):
        submit(engine, [1])
    engine.close()
    engine.close()


class Held(ClosedFormSlotBackend):
    """Decodes only as long as it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Semaphore(0)

    def decode(self, tokens: Any, lengths: Any) -> Any:
        assert self.go.acquire(timeout=30)
        return super().decode(tokens, lengths)


@pytest.mark.parametrize("how", ["drain", "close"])
def test_no_accepted_request_is_left_without_an_end(how: str) -> None:
    backend = Held()
    engine = SlotEngine(backend, TOKENIZER, EOS, EngineConfig(slots=4, prefill_chunk=8))
    heard = [submit(engine, [index], max_new_tokens=40, ignore_eos=True) for index in range(9)]
    timer = threading.Timer(0.2, lambda: [backend.go.release() for _ in range(1000)])
    timer.start()
    if how == "drain":
        assert engine.drain(0.05) is False
    engine.close()
    timer.join()
    reason = "timeout" if how == "drain" else "cancelled"
    assert {each.ends[0].reason for each in heard} == {reason} and backend.closed
    assert all(isinstance(each.events[-1], FinishEvent) for each in heard)


def test_who_waits_for_the_end_hears_of_a_close() -> None:
    backend = Held()
    engine = SlotEngine(backend, TOKENIZER, EOS, EngineConfig(slots=4, prefill_chunk=8))
    ends: list[str] = []

    def listener(event: Event) -> None:
        if isinstance(event, FinishEvent):
            time.sleep(0.05)  # Whoever waits looks once more before it is over.
            ends.append(event.reason)

    engine.submit(GenerationRequest((1,), SamplingParams(max_new_tokens=40)), listener)
    results: list[bool] = []
    waiting = threading.Thread(target=lambda: results.append(engine.drain(60)), daemon=True)
    waiting.start()
    closing = threading.Thread(target=engine.close)
    closing.start()
    backend.go.release()
    closing.join(30)
    waiting.join(30)
    assert results == [True] and ends == ["cancelled"]


def test_an_engine_without_requests_makes_no_steps() -> None:
    steps = []

    class Counting(SlotEngine):
        def step(self) -> bool:
            steps.append(1)
            return super().step()

    engine = Counting(ClosedFormSlotBackend(), TOKENIZER, EOS, EngineConfig(slots=4, prefill_chunk=8))
    submit(engine, [1], max_new_tokens=5, ignore_eos=True)
    assert engine.drain(60)
    time.sleep(0.05)
    engine.close()
    assert len(steps) == 5


def test_requests_from_many_threads() -> None:
    engine = threaded(queue_limit=1000)
    heard: list[Heard] = []

    def client(number: int) -> None:
        for index in range(10):
            heard.append(submit(engine, [number, index], max_new_tokens=7, ignore_eos=True))
            engine.stats()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert engine.drain(60)
    assert len(heard) == 80
    assert all(each.ids() == greedy(list(each.request.prompt), 7, 257) for each in heard)
    engine.close()


def test_settings_have_bounds() -> None:
    for fields in (
        {"slots": 0},
        {"slots": None},
        {"prefill_chunk": 0},
        {"queue_limit": -1},
        {"max_length": 1},
        {"default_timeout": 0},
    ):
        ((name, _),) = fields.items()
        with pytest.raises(InputError, match=f"{name} is"):
            EngineConfig(**fields)
    with pytest.raises(InputError, match="max_length is 65; the model's context is 64"):
        EngineConfig(max_length=65).length(64)
    assert EngineConfig().length(64) == 64 and EngineConfig(max_length=9).length(64) == 9
