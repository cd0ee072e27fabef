"""What the Open Inference Protocol runs, by HTTP and gRPC alike: whole or streamed text, or another signature."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from serving.engine.api import GenerationRequest, PromptEvent, TokenEvent
from serving.errors import InputError
from serving.protocols.batch_completion import complete
from serving.protocols.model_status import parse_version
from serving.protocols.open_inference.signatures import (
    GENERATE,
    SPECS,
    Arrays,
    InferRequest,
    Specs,
    bodies,
    check,
    filled,
    selected,
)
from serving.protocols.openai.routes import make_requests, read_prompts
from serving.protocols.texts import LONG_TEXT
from serving.protocols.tf_serving import signatures as tf_signatures
from serving.protocols.tf_serving.signatures import Call, objects, padded
from serving.server.errors import error_of
from serving.server.event_queue import EventQueue, beside_if, with_model
from serving.server.registry import ServedModel
from serving.server.state import Server
from serving.server.tracing import COMPLETION, Span, start_span

_MANY = 16
"""Texts from which on their options are checked in another thread."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Answer:
    """The outputs that were asked for, in that order; `final` is False if more parts follow."""

    model: ServedModel
    outputs: Arrays
    specs: Specs
    final: bool = True


async def infer(server: Server, request: InferRequest) -> Answer:
    """All of a request's answer at once. Raises InputError and what the engine raises."""
    check(request)

    async def work(model: ServedModel) -> Arrays:
        open_span = functools.partial(start_span, COMPLETION, request.headers, model.name)
        if request.signature == GENERATE:
            prepared = await _prepare(server, model, request)
            rows = await complete(model.engine, [each for each, _ in prepared], open_span)
            return _made(
                [row.text for row in rows],
                [row.token_ids for row in rows],
                [prompt for _, prompt in prepared],
                [row.finish.reason for row in rows],
                model.engine.eos_token_id,
            )
        most = (server.settings.max_prompts, server.settings.max_prompt_tokens)
        call = Call(model.engine, request.limit(), request.request_id, *most, open_span)
        return await tf_signatures.run(request.signature, call, filled(request))

    model, outputs = await _on_model(server, request, work)
    return Answer(model, selected(request, outputs), SPECS[request.signature][1])


async def open_stream(server: Server, request: InferRequest) -> Stream:
    """Begin a streamed generation. Raises what `infer` raises, also for several rows."""
    check(request)
    if request.signature != GENERATE:
        raise InputError(f"only {GENERATE} streams; ask for {request.signature} without stream")
    if request.inputs["text_input"].size != 1:
        raise InputError(f"a stream takes one text, and text_input has {request.inputs['text_input'].size}")

    async def work(model: ServedModel) -> Stream:
        ((prepared, prompt_tokens),) = await _prepare(server, model, request)
        generation = await EventQueue.open(model.engine, [prepared])
        return Stream(model, generation, request, prompt_tokens, start_span(COMPLETION, request.headers, model.name))

    _, stream = await _on_model(server, request, work)
    return stream


@dataclass
class Stream:
    """A text under way."""

    model: ServedModel
    generation: EventQueue
    request: InferRequest
    prompt_tokens: int
    span: Span
    finish_reason: str = ""

    async def pieces(self) -> AsyncGenerator[Answer, None]:
        """The new text since the last part; the last part has a `finish_reason`, the others have "" there.

        Raises the error that an ending stands for.
        """
        text, token_ids, generated = "", list[int](), 0
        ended_by: BaseException | None = None
        try:
            while batch := await self.generation.next():
                for _, event in batch:
                    if isinstance(event, PromptEvent):
                        self.span.event("prompt_read")
                        continue
                    text += event.text
                    if isinstance(event, TokenEvent):
                        token_ids.append(event.token_id)
                        generated += 1
                        continue
                    error = error_of(event)
                    if error is not None:
                        raise error
                    self.finish_reason = event.reason
                if text or self.finish_reason:
                    made = _made(
                        [text],
                        [token_ids],
                        [self.prompt_tokens],
                        [self.finish_reason],
                        self.model.engine.eos_token_id,
                    )
                    outputs = selected(self.request, made)
                    yield Answer(self.model, outputs, SPECS[GENERATE][1], final=bool(self.finish_reason))
                    text, token_ids = "", []
        except BaseException as error:
            ended_by = error
            raise
        finally:
            self.generation.close()
            self.span.end(self.prompt_tokens, generated, [self.finish_reason or "unfinished"], ended_by)


async def _on_model(
    server: Server, request: InferRequest, work: Callable[[ServedModel], Awaitable[_T]]
) -> tuple[ServedModel, _T]:
    """`work` on the version asked for, or on the newest one, and on its successor if it is swapped meanwhile."""
    return await with_model(server.registry, request.model, parse_version(request.version), work)


async def _prepare(server: Server, model: ServedModel, request: InferRequest) -> list[tuple[GenerationRequest, int]]:
    """For each text its request to the engine and how many tokens its prompt has."""
    prepared = []
    limit = request.limit()
    rows = await beside_if(
        request.inputs["text_input"].size > _MANY, lambda: bodies(request, server.settings.max_prompts)
    )
    beside = sum(len(text) for body in rows for text in body.prompt) > LONG_TEXT
    for index, body in enumerate(rows):
        prompts = await read_prompts(body, model, server.settings.max_prompt_tokens, beside)
        request_id = request.request_id if len(rows) == 1 else f"{request.request_id}-{index}"
        (made,) = make_requests(body, prompts, model, limit, request_id)
        prepared.append((made, len(made.prompt)))
    return prepared


def _made(
    texts: list[str], token_ids: Sequence[Sequence[int]], prompts: list[int], reasons: list[str], fill: int
) -> Arrays:
    """The outputs of "generate"."""
    ids, lengths = padded(token_ids, fill)
    return {
        "text_output": objects([text.encode("utf-8") for text in texts]),
        "token_ids": ids,
        "lengths": lengths,
        "prompt_tokens": np.array(prompts, np.int32),
        "finish_reason": objects([reason.encode() for reason in reasons]),
    }
