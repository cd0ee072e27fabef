"""One call of OpenAI's protocols under way: its choices, its whole answer, or its stream of chunks."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from serving.engine.api import Event, PromptEvent, TokenEvent
from serving.protocols.openai.choices import ChoiceState, LogprobsWriter, Prompt, token_names
from serving.protocols.openai.layouts import Layout
from serving.protocols.openai.schema import CompletionRequest
from serving.server.errors import error_of, failure_of
from serving.server.event_queue import EventQueue
from serving.server.middleware import log, openai_error
from serving.server.registry import ServedModel
from serving.server.tracing import Span

_DONE = b"data: [DONE]\n\n"


@dataclass
class Run:
    """One call under way: its choices, and the frame that each answer and chunk has."""

    body: CompletionRequest
    layout: Layout
    model: ServedModel
    prompts: list[Prompt]
    generation: EventQueue
    request_id: str
    span: Span
    state: Any

    def __post_init__(self) -> None:
        engine, body = self.model.engine, self.body
        names = None if body.logprobs is None and body.prompt_logprobs is None else token_names(engine)
        self.n = body.n or 1
        self.choices = [
            ChoiceState(
                index=index * self.n + continuation,
                prompt=prompt,
                writer=None if names is None or body.logprobs is None else LogprobsWriter(names, body.logprobs),
                names=names,
                prompt_top=body.prompt_logprobs,
                keep_generated=body.max_tokens != 0,
                ids=[] if body.return_token_ids else None,
            )
            for index, prompt in enumerate(self.prompts)
            for continuation in range(self.n)
        ]
        self.cached = 0
        self.eos_token_id = engine.eos_token_id
        self.frame: dict[str, Any] = {
            "id": f"{self.layout.id_prefix}{self.request_id}",
            "object": self.layout.object,
            "created": int(time.time()),
            "model": self.model.name,
            "system_fingerprint": f"v{self.model.version}-{self.model.fingerprint}",
        }

    def take(self, batch: list[tuple[int, Event]]) -> list[ChoiceState]:
        """Give `batch` to the choices and return those that have changed, each once, in the order of their events.

        Raises the error that an ending stands for.
        """
        changed: dict[int, ChoiceState] = {}
        for request, event in batch:
            if isinstance(event, PromptEvent):
                self.cached += event.cached_tokens
                self.span.event("prompt_read")
                for choice in self.choices[request * self.n : (request + 1) * self.n]:
                    choice.on_prompt(event)
                    changed[choice.index] = choice
                continue
            choice = self.choices[request * self.n + event.index]
            changed[choice.index] = choice
            if isinstance(event, TokenEvent):
                choice.on_token(event)
                continue
            error = error_of(event)
            if error is not None:
                raise error
            choice.on_finish(event, self.eos_token_id)
        return list(changed.values())

    def whole(self) -> dict[str, Any]:
        """The whole answer."""
        return self.answer([self.layout.whole(choice) for choice in self.choices], usage=True)

    def answer(self, choices: list[dict[str, Any]], usage: bool) -> dict[str, Any]:
        """A whole answer or a chunk."""
        answer = {**self.frame, "choices": choices}
        if usage:
            answer["usage"] = self.usage()
        return answer

    def usage(self) -> dict[str, Any]:
        prompt = sum(len(prompt.ids) for prompt in self.prompts)
        generated = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }

    def close(self, error: BaseException | None = None) -> None:
        """Free what is still held and leave a note for the log and the trace, of `error` too if it ended so."""
        self.generation.close()
        usage = self.usage()
        reasons = sorted({choice.finish_reason or "unfinished" for choice in self.choices})
        self.state.log = {
            "model": self.model.name,
            "version": self.model.version,
            "prompt_tokens": usage["prompt_tokens"],
            "completion_tokens": usage["completion_tokens"],
            "finish_reasons": reasons,
        }
        self.span.end(usage["prompt_tokens"], usage["completion_tokens"], reasons, error)


async def stream(run: Run) -> AsyncGenerator[bytes, None]:
    """The chunks of a stream as server-sent events.

    What came since the last chunk goes out as one chunk for each choice. The frame is written once: building each
    chunk's JSON from scratch takes several times as long as the rest of a token's way.
    """
    run.frame["object"] = run.layout.chunk_object
    head = b"data: " + json.dumps(run.frame)[:-1].encode() + b', "choices": ['
    options = run.body.stream_options
    with_usage = options is not None and bool(options.include_usage)
    continuous = with_usage and options is not None and bool(options.continuous_usage_stats)
    tail = b'], "usage": null}\n\n' if with_usage else b"]}\n\n"
    ended_by: BaseException | None = None
    try:
        while changed := run.take(await run.generation.next()):
            pieces = [piece for choice in changed for piece in run.layout.chunks(choice)]
            if continuous:
                tail = b'], "usage": ' + json.dumps(run.usage()).encode() + b"}\n\n"
            if pieces:
                yield b"".join(part for piece in pieces for part in (head, piece, tail))
        if with_usage:
            yield b"data: " + json.dumps(run.answer([], usage=True)).encode() + b"\n\n"
        yield _DONE
    except (GeneratorExit, asyncio.CancelledError) as error:
        ended_by = error
        raise
    except Exception as error:
        ended_by = error
        failure = failure_of(error)
        if failure.internal:
            log.error("a stream failed", exc_info=error, extra={"request_id": run.request_id})
        yield b"data: " + json.dumps({"error": openai_error(failure)}).encode() + b"\n\n" + _DONE
    finally:
        run.close(ended_by)
