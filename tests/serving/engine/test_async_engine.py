"""Events in an event loop: all of them, in order, few wake-ups, and a cancel for whoever goes away."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from serving.engine.api import FinishEvent, GenerationRequest, PromptEvent, QueueFullError, TokenEvent
from serving.engine.async_engine import stream
from serving.engine.config import EngineConfig
from serving.engine.engine import SlotEngine
from serving.sampling import SamplingParams
from tests.closed_form import ClosedFormSlotBackend, greedy
from tests.serving.engine.harness import EOS, TOKENIZER


class Slow(ClosedFormSlotBackend):
    """Decodes at a pace at which a loop keeps up."""

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


def test_all_events_in_order(engine: SlotEngine) -> None:
    async def client(number: int) -> None:
        events = [event async for event in stream(engine, request([number], 20, n=1 + number % 2))]
        assert isinstance(events[0], PromptEvent)
        for index in range(1 + number % 2):
            own = [event for event in events[1:] if not isinstance(event, PromptEvent) and event.index == index]
            assert [event.token_id for event in own if isinstance(event, TokenEvent)] == greedy([number], 20, 257)
            assert isinstance(own[-1], FinishEvent)

    async def main() -> None:
        await asyncio.gather(*map(client, range(6)))

    asyncio.run(main())
    asyncio.run(main())  # A second loop has a mailbox of its own.


def test_a_step_wakes_a_loop_once(engine: SlotEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    wakes = []

    async def client(number: int) -> None:
        async for _ in stream(engine, request([number], 50)):
            pass

    async def main() -> None:
        loop = asyncio.get_running_loop()
        call = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: (wakes.append(1), call(*args))[1])
        await asyncio.gather(*map(client, range(4)))

    asyncio.run(main())
    # Prompt and decode of one step may each wake it; without batching there would be over 200.
    assert 20 <= len(wakes) <= 2 * engine.stats().steps


@pytest.mark.parametrize("how", ["close", "cancel", "drop", "break"])
def test_who_goes_away_frees_the_slot(engine: SlotEngine, how: str) -> None:
    async def main() -> None:
        events = stream(engine, request([1], 60, n=2))
        if how == "drop":
            del events
        elif how == "break":
            async for event in events:
                if isinstance(event, TokenEvent):
                    break
            del events
        elif how == "close":
            await anext(events)
            await events.aclose()
            with pytest.raises(StopAsyncIteration):
                await anext(events)
        else:

            async def read() -> None:
                async for _ in events:
                    pass

            task = asyncio.create_task(read())
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await free(engine)
        assert engine.stats().generated_tokens < 120

    asyncio.run(main())


def test_what_submit_raises_is_raised_at_once(engine: SlotEngine) -> None:
    async def main() -> None:
        kept = [stream(engine, request([1], 60)) for _ in range(8)]
        with pytest.raises(QueueFullError):
            kept += [stream(engine, request([1], 60)) for _ in range(9)]

    asyncio.run(main())


def test_an_engine_without_flushes_wakes_for_each_event() -> None:
    class Other:
        def submit(self, request: GenerationRequest, listener: Any) -> Any:
            listener(PromptEvent(0))
            listener(FinishEvent(0, "length"))

    async def main() -> None:
        other: Any = Other()
        assert len([event async for event in stream(other, request([1], 1))]) == 2

    asyncio.run(main())


def test_a_loop_that_is_gone_is_no_error(engine: SlotEngine) -> None:
    kept = []

    async def main() -> None:
        kept.append(stream(engine, request([1], 30)))

    asyncio.run(main())
    assert engine.drain(30)
    assert engine.stats().generated_tokens == 30
