"""vLLM's /tokenize and /detokenize."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serving.protocols.json_requests import while_connected
from serving.protocols.openai.chat import render, template_of
from serving.protocols.openai.chat_schema import TokenizeRequest
from serving.protocols.openai.choices import token_names
from serving.protocols.openai.routes import model_name
from serving.protocols.openai.schema import DetokenizeRequest
from serving.protocols.texts import LONG_TEXT, decode, encode_texts
from serving.server.errors import FieldError
from serving.server.event_queue import beside_if
from serving.server.registry import ModelRegistry
from serving.server.request_bodies import read_body


async def tokenize(request: Request) -> Response:
    """POST /tokenize."""
    body = await read_body(request, TokenizeRequest)
    if (body.prompt is None) == (body.messages is None):
        raise FieldError("give prompt or messages, and not both", "prompt")
    registry: ModelRegistry = request.app.state.server.registry
    model = registry.get(model_name(registry, body.model))
    engine = model.engine

    async def ids_of_body() -> list[int]:
        text = body.prompt if body.messages is None else await render(await template_of(model), body)
        return (await encode_texts(engine.tokenizer, [text or ""]))[0]

    ids = await while_connected(request, ids_of_body())

    def answer() -> Response:
        names = token_names(engine) if body.return_token_strs else None
        strings = None if names is None else [names[token] for token in ids]
        return JSONResponse(
            {"count": len(ids), "max_model_len": engine.n_positions, "tokens": ids, "token_strs": strings}
        )

    return await beside_if(len(ids) > LONG_TEXT, answer)


async def detokenize(request: Request) -> Response:
    """POST /detokenize."""
    body = await read_body(request, DetokenizeRequest)
    registry: ModelRegistry = request.app.state.server.registry
    engine = registry.get(model_name(registry, body.model)).engine
    wrong = max(body.tokens, default=0)
    if wrong >= engine.vocab_size:
        raise FieldError(f"tokens has {wrong}, but the vocabulary has {engine.vocab_size} tokens", "tokens")
    (text,) = await while_connected(request, decode(engine.tokenizer, [body.tokens], special=True))
    return JSONResponse({"prompt": text})


def token_routes() -> list[Route]:
    """The routes of this module."""
    return [
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
    ]
