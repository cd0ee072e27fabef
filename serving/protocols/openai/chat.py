"""OpenAI's chat completions: messages through the bundle's chat template, then the path of completions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.chat import ChatTemplate, TemplateError
from serving.protocols.openai.chat_schema import ChatRequest, RenderedChat, TemplateFields
from serving.protocols.openai.layouts import Chat
from serving.protocols.openai.routes import respond
from serving.server.errors import FieldError
from serving.server.registry import ServedModel
from serving.server.request_bodies import read_body

_Result = TypeVar("_Result")


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions."""
    body = await read_body(request, ChatRequest)
    _check(body)

    async def prepare(model: ServedModel) -> RenderedChat:
        template = await template_of(model)
        text = await render(template, body)
        end_ids = await _beside(template, lambda: template.end_token_ids(model.engine.tokenizer))
        return RenderedChat.of(body, text, tuple(id for id in end_ids if id != model.engine.eos_token_id))

    return await respond(request, body, prepare, Chat(), long=True)


def _check(body: ChatRequest) -> None:
    """Refuse what does not go together."""
    if body.max_tokens == 0:
        raise FieldError("max_tokens is 0; ask for at least 1", "max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise FieldError("top_logprobs takes 'logprobs': true", "top_logprobs")


async def template_of(model: ServedModel) -> ChatTemplate:
    """The chat template of `model`. Raises FieldError where it has none."""
    template = await asyncio.to_thread(model.chat_template)
    if template is None:
        raise FieldError(
            f"the model {model.name!r} has no chat template, so it knows no messages; use /v1/completions", "messages"
        )
    return template


async def render(template: ChatTemplate, body: TemplateFields) -> str:
    """The prompt of `body`'s messages. Raises FieldError with the template's sentence, RendererBusyError."""
    continued = bool(body.continue_final_message)
    if continued and body.add_generation_prompt:
        raise FieldError(
            "continue_final_message and add_generation_prompt are both true; set one to false", "continue_final_message"
        )
    messages = [message.for_template() for message in body.messages or ()]

    def work() -> str:
        return template.render(
            messages,
            add_generation_prompt=not continued if body.add_generation_prompt is None else body.add_generation_prompt,
            continue_final_message=continued,
            variables=body.chat_template_kwargs,
        )

    return await _beside(template, work)


async def _beside(template: ChatTemplate, work: Callable[[], _Result]) -> _Result:
    """The result of `work`, done in one of the template's threads; dropped there if nobody waits for it any more."""
    try:
        return await asyncio.get_running_loop().run_in_executor(template.threads, work)
    except TemplateError as error:
        raise FieldError(str(error), "messages") from None


def chat_routes() -> list[Route]:
    """The routes of this module."""
    return [Route("/v1/chat/completions", chat_completions, methods=["POST"])]
