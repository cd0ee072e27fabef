"""Whole answers for the rows of one request: all of them, or the first one's error and nothing left running."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serving.engine.api import Engine, Event, FinishEvent, GenerationRequest, PromptEvent, TokenEvent
from serving.server.errors import error_of
from serving.server.event_queue import EventQueue
from serving.server.tracing import OpenSpan, Span


@dataclass(frozen=True)
class RowCompletion:
    """One continued prompt: its tokens (the end-of-text token included), its text and how it ended."""

    token_ids: tuple[int, ...]
    text: str
    finish: FinishEvent
    prompt: PromptEvent | None


async def complete(
    engine: Engine, requests: Sequence[GenerationRequest], open_span: OpenSpan = Span
) -> list[RowCompletion]:
    """Run `requests`, each with n = 1, side by side; their rows in order. The engine's work on them is one span.

    Raises what `Engine.submit` raises, or the error of the first row that did not end by itself; the other rows are
    then cancelled, as they are when the caller is.
    """
    heard: list[list[Event]] = [[] for _ in requests]
    generation = await EventQueue.open(engine, requests, whole=True)
    span = open_span() if requests else None
    try:
        while batch := await generation.next():
            for index, event in batch:
                heard[index].append(event)
            ends = (event for _, event in batch if isinstance(event, FinishEvent))
            if (failure := next(filter(None, map(error_of, ends)), None)) is not None:
                raise failure
    except BaseException as error:
        for index, event in generation.take():
            heard[index].append(event)
        _end(span, requests, heard, error)
        raise
    finally:
        generation.close()
    _end(span, requests, heard)
    return [_row(events) for events in heard]


def _end(
    span: Span | None,
    requests: Sequence[GenerationRequest],
    heard: Sequence[Sequence[Event]],
    error: BaseException | None = None,
) -> None:
    if span is None:
        return
    events = [event for each in heard for event in each]
    reasons: set[str] = {event.reason for event in events if isinstance(event, FinishEvent)}
    if sum(isinstance(event, FinishEvent) for event in events) < len(requests):
        reasons.add("unfinished")
    generated = sum(isinstance(event, TokenEvent) for event in events)
    span.end(sum(len(request.prompt) for request in requests), generated, sorted(reasons), error)


def _row(events: Sequence[Event]) -> RowCompletion:
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    finish = events[-1]
    assert isinstance(finish, FinishEvent)
    return RowCompletion(
        tuple(event.token_id for event in tokens),
        "".join(event.text for event in tokens) + finish.text,
        finish,
        next((event for event in events if isinstance(event, PromptEvent)), None),
    )
