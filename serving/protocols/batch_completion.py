"""Whole answers for the rows of one request: all of them, or the first one's error and nothing left running."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from serving.engine.api import Engine, Event, FinishEvent, GenerationRequest, Handle, PromptEvent, TokenEvent
from serving.server.errors import error_of
from serving.server.event_queue import beside_if, one_call, takes_long
from serving.server.tracing import OpenSpan, Span


@dataclass(frozen=True)
class Row:
    """One continued prompt: its tokens (the end-of-text token included), its text and how it ended."""

    token_ids: tuple[int, ...]
    text: str
    finish: FinishEvent
    prompt: PromptEvent | None


async def complete(engine: Engine, requests: Sequence[GenerationRequest], open_span: OpenSpan = Span) -> list[Row]:
    """Run `requests`, each with n = 1, side by side; their rows in order. The engine's work on them is one span.

    Raises what `Engine.submit` raises, or the error of the first row that did not end by itself; the other rows are
    then cancelled, as they are when the caller is.
    """
    loop = asyncio.get_running_loop()
    ended: list[asyncio.Future[None]] = [loop.create_future() for _ in requests]
    heard: list[list[Event]] = [[] for _ in requests]
    handles: list[Handle] = []
    span: Span | None = None
    cancelled = False

    def submit_all() -> None:
        for request, events, future in zip(one_call(engine, requests), heard, ended, strict=True):
            handles.append(_submit(engine, request, loop, events, future))
            if cancelled:
                handles[-1].cancel()
                return

    try:
        await beside_if(takes_long(requests), submit_all)
        span = open_span() if requests else None
        await asyncio.gather(*ended)
        rows = [_row(events) for events in heard]
    except BaseException as error:
        cancelled = True
        for handle in list(handles):
            handle.cancel()
        for future in ended:
            future.cancel()
        _end(span, requests, heard, error)
        raise
    _end(span, requests, heard)
    return rows


def _end(
    span: Span | None,
    requests: Sequence[GenerationRequest],
    heard: Sequence[Sequence[Event]],
    error: BaseException | None = None,
) -> None:
    if span is None:
        return
    events = [event for each in heard for event in list(each)]
    reasons: set[str] = {event.reason for event in events if isinstance(event, FinishEvent)}
    if sum(isinstance(event, FinishEvent) for event in events) < len(requests):
        reasons.add("unfinished")
    generated = sum(isinstance(event, TokenEvent) for event in events)
    span.end(sum(len(request.prompt) for request in requests), generated, sorted(reasons), error)


def _submit(
    engine: Engine,
    request: GenerationRequest,
    loop: asyncio.AbstractEventLoop,
    events: list[Event],
    ended: asyncio.Future[None],
) -> Handle:
    """Submit, and collect `events`; `ended` is set once a row, so that the event loop does not wake for each token."""

    def finish() -> None:
        if not ended.done():
            error = error_of(events[-1]) if isinstance(events[-1], FinishEvent) else None
            if error is None:
                ended.set_result(None)
            else:
                ended.set_exception(error)

    def listener(event: Event) -> None:
        events.append(event)
        if isinstance(event, FinishEvent):
            # The loop may be gone while the engine still ends its rows.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(finish)

    return engine.submit(request, listener)


def _row(events: Sequence[Event]) -> Row:
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    finish = events[-1]
    assert isinstance(finish, FinishEvent)
    return Row(
        tuple(event.token_id for event in tokens),
        "".join(event.text for event in tokens) + finish.text,
        finish,
        next((event for event in events if isinstance(event, PromptEvent)), None),
    )
