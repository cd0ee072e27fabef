"""Requests of many continuations: what they share is built once, and not while others wait for it."""

from __future__ import annotations

import asyncio
import string
import threading
import time
from typing import Any

import numpy as np
import pytest

from serving.engine.api import GenerationRequest
from serving.sampling import SamplingParams
from serving.sampling.penalties import PenaltyState
from serving.server.event_queue import EventQueue
from tests.serving.engine.harness import EOS, Stepped, wanted

LONG_STOPS = tuple(letter * 1023 + "." for letter in string.ascii_lowercase[:16])


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_new_tokens=2, stop=LONG_STOPS),
        SamplingParams(max_new_tokens=2, logit_bias=dict.fromkeys(range(257), 0.5)),
        SamplingParams(max_new_tokens=2, stop_token_ids=tuple(range(257)), min_tokens=2),
    ],
    ids=["stop", "bias", "ends"],
)
def test_the_largest_request_is_taken_in_at_once(params: SamplingParams) -> None:
    stepped = Stepped(slots=16)
    began = time.monotonic()
    for _ in range(128):
        stepped.submit([65], params=params, n=16)
    assert time.monotonic() - began < 2, "minutes where each continuation has its own"


def test_a_bias_of_a_whole_vocabulary_is_copied_for_nobody() -> None:
    params = SamplingParams(logit_bias=dict.fromkeys(range(50000), -1.0))
    began = time.monotonic()
    first = PenaltyState([[1, 2]], [params], EOS)
    others = [first.copy() for _ in range(2048)]
    assert time.monotonic() - began < 1
    assert all(np.shares_memory(each.logits_processor.bias, first.logits_processor.bias) for each in others)


def test_copies_of_a_history_go_their_own_ways() -> None:
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=0.5, logit_bias={3: 1.0}, min_tokens=2)
    first = PenaltyState([[1]], [params], EOS)
    second = first.copy()
    for token in (3, 5):
        first.add(0, token)
    alone = PenaltyState([[1]], [params], EOS)
    logits = np.random.default_rng(0).standard_normal((1, 257)).astype(np.float32)
    row = np.arange(1)
    np.testing.assert_array_equal(second.logits_processor.apply(logits, row), alone.logits_processor.apply(logits, row))
    for token in (3, 5):
        alone.add(0, token)
    np.testing.assert_array_equal(first.logits_processor.apply(logits, row), alone.logits_processor.apply(logits, row))


def test_continuations_of_a_bias_with_penalties_are_those_of_generate() -> None:
    stepped = Stepped(slots=4)
    bias = {token: 0.25 * (token % 3) for token in range(257)}
    fields: dict[str, Any] = {"logit_bias": bias, "frequency_penalty": 1.5, "temperature": 0.9, "seed": 5}
    heard, _ = stepped.submit([65, 66], max_new_tokens=12, n=3, **fields)
    stepped.run()
    for index in range(3):
        assert heard.ids(index) == wanted(heard.request, index)[0]


def test_a_large_request_is_submitted_beside_the_loop_and_can_be_given_up_there() -> None:
    stepped = Stepped(slots=16)
    engine, real, threads = stepped.engine, stepped.engine.submit, list[threading.Thread]()

    def submit(request: GenerationRequest, listener: Any) -> Any:
        threads.append(threading.current_thread())
        time.sleep(0.01)
        return real(request, listener)

    engine.submit = submit  # type: ignore[method-assign, assignment]
    requests = [GenerationRequest((65,), SamplingParams(max_new_tokens=50, ignore_eos=True), n=16)] * 8

    async def give_up() -> None:
        opening = asyncio.create_task(EventQueue.open(engine, requests))
        await asyncio.sleep(0.03)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening

    asyncio.run(give_up())
    assert 0 < len(threads) < 8 and threading.main_thread() not in threads
    stepped.run()
    stepped.check_idle()
