"""The engine's events in an event loop: all of them, in order, few wake-ups, and a cancel for whoever goes away."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from serving.engine.api import Event, FinishEvent, GenerationRequest, PromptEvent, TokenEvent
from serving.engine.config import EngineConfig
from serving.engine.engine import SlotEngine
from serving.errors import InputError
from serving.protocols.batch_completion import complete
from serving.sampling import SamplingParams
from serving.server.event_queue import EventQueue
from tests.closed_form import ClosedFormSlotBackend, greedy
from tests.serving.engine.harness import EOS, TOKENIZER


class Slow(ClosedFormSlotBackend):
    """Decodes at a rate at which a loop keeps up."""

    def decode(self, tokens: Any, lengths: Any) -> Any:
        time.sleep(0.002)
        return super().decode(tokens, lengths)


@pytest.fixture
def engine() -> Any:
    made = SlotEngine(Slow(), TOKENIZER, EOS, EngineConfig(slots=4, prefill_chunk=8, queue_limit=4))
    yield made
    made.close()


def request(prompt: list[int], count: int, n: int = 1) -> GenerationRequest:
    return GenerationRequest(tuple(prompt), SamplingParams(max_new_tokens=count, ignore_eos=True), n)


async def free(engine: SlotEngine) -> None:
    async with asyncio.timeout(10):
        while engine.stats().active_slots or engine.stats().waiting_requests:
            await asyncio.sleep(0.002)


@pytest.fixture
def wakes(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Fills with one entry for each time that another thread wakes a loop."""
    found: list[float] = []
    real = asyncio.BaseEventLoop.call_soon_threadsafe

    def call(self: Any, *args: Any, **options: Any) -> Any:
        found.append(time.monotonic())
        return real(self, *args, **options)

    monkeypatch.setattr(asyncio.BaseEventLoop, "call_soon_threadsafe", call)
    return found


def test_all_events_in_order(engine: SlotEngine) -> None:
    async def client(number: int) -> None:
        n = 1 + number % 2
        generation = await EventQueue.open(engine, [request([number], 20, n), request([number + 9], 5)])
        events: list[tuple[int, Event]] = []
        while batch := await generation.next():
            events += batch
        generation.close()
        for which, start, count, continuations in ((0, number, 20, n), (1, number + 9, 5, 1)):
            mine = [event for index, event in events if index == which]
            assert isinstance(mine[0], PromptEvent)
            for place in range(continuations):
                own = [event for event in mine[1:] if not isinstance(event, PromptEvent) and event.index == place]
                found = [event.token_id for event in own if isinstance(event, TokenEvent)]
                assert found == greedy([start], count, 257)
                assert isinstance(own[-1], FinishEvent)

    async def main() -> None:
        await asyncio.gather(client(1), client(2))

    asyncio.run(main())
    asyncio.run(main())


def test_a_loop_that_is_late_is_woken_once_for_all(engine: SlotEngine, wakes: list[float]) -> None:
    async def main() -> None:
        generation = await EventQueue.open(engine, [request([1], 50)])
        while engine.stats().active_slots or engine.stats().waiting_requests:
            time.sleep(0.002)  # The loop does not run.
        assert len(await generation.next()) == 52

    asyncio.run(main())
    assert len(wakes) == 1


def test_whole_answers_wake_a_loop_once_a_row(engine: SlotEngine, wakes: list[float]) -> None:
    async def main() -> None:
        rows = await complete(engine, [request([number], 50) for number in range(4)])
        assert [list(row.token_ids) for row in rows] == [greedy([number], 50, 257) for number in range(4)]

    asyncio.run(main())
    assert 1 <= len(wakes) <= 4


@pytest.mark.parametrize("how", ["close", "cancel", "whole"])
def test_who_goes_away_frees_the_slot(engine: SlotEngine, how: str) -> None:
    async def read() -> None:
        if how == "whole":
            await complete(engine, [request([1], 60), request([2], 60)])
        generation = await EventQueue.open(engine, [request([1], 60, n=2)])
        try:
            while await generation.next():
                if how == "close":
                    return
        finally:
            generation.close()

    async def main() -> None:
        task = asyncio.create_task(read())
        if how == "close":
            await task
        else:
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await free(engine)
        assert engine.stats().generated_tokens < 120

    asyncio.run(main())


def test_one_refused_request_leaves_nothing_running(engine: SlotEngine) -> None:
    async def main() -> None:
        with pytest.raises(InputError, match="leaves no room"):
            await EventQueue.open(engine, [request([1], 60)] * 3 + [request([1] * 10_000, 60)])
        await free(engine)
        assert engine.stats().generated_tokens < 60

    asyncio.run(main())


def test_a_loop_that_is_gone_is_no_error(engine: SlotEngine) -> None:
    async def main() -> None:
        await EventQueue.open(engine, [request([1], 30)])

    asyncio.run(main())
    asyncio.run(free(engine))
    assert engine.stats().generated_tokens == 30
