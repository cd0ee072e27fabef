"""OpenAI's completions protocol, with the extras that vLLM's users know, and the path that chat shares with it."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import fields
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serving.engine.api import GenerationRequest
from serving.errors import InputError
from serving.protocols.json_requests import while_connected
from serving.protocols.model_status import model_status
from serving.protocols.openai.choices import Prompt, token_names
from serving.protocols.openai.layouts import Completions, Layout
from serving.protocols.openai.sampling_fields import SamplingFields
from serving.protocols.openai.schema import CompletionRequest
from serving.protocols.openai.stream import Run, stream
from serving.protocols.texts import LONG_TEXT, TooLongError, encode_prompts
from serving.sampling import DECLARATIONS, MAX_SEED, SamplingParams
from serving.sampling.constraints import Grammar
from serving.server.auth import CALLER
from serving.server.callers import is_kserve_client, is_openai_client
from serving.server.errors import ContextLengthError, DeadlineExceededError, FieldError
from serving.server.event_queue import beside_if, submit, time_left, time_limit
from serving.server.event_stream import EventStream
from serving.server.grammar_pool import compile_grammar
from serving.server.registry import ModelNotReadyError, ModelRegistry, ServedModel, State
from serving.server.request_bodies import read_body
from serving.server.state import Server
from serving.server.tracing import start_span

MAX_CHOICES = 4096
"""Of one call."""
_ENGINE_FIELDS = {"prompt", "n", "logprobs", "prompt_logprobs"} | {each.name for each in fields(SamplingParams)}


async def completions(request: Request) -> Response:
    """POST /v1/completions."""
    server: Server = request.app.state.server
    body = await read_body(request, CompletionRequest)
    _check(body, server)

    async def prepared(model: ServedModel) -> CompletionRequest:
        return body

    return await respond(request, body, prepared, Completions(), long=_takes_long(body))


async def respond(
    request: Request,
    asked: SamplingFields,
    prepare: Callable[[ServedModel], Awaitable[CompletionRequest]],
    layout: Layout,
    long: bool,
) -> Response:
    """Generate what `prepare` makes of a request for a model, and answer in `layout`, whole or as a stream.

    `asked` is the request's body. Where the prompt takes `long` to read, the client may go away before it is.
    """
    server: Server = request.app.state.server
    check_stream_options(asked)
    wanted = asked.structured_output()
    limit, began = time_limit(request, server.settings.request_timeout), time.monotonic()
    request_id: str = request.state.request_id
    prompts: list[Prompt] = []
    bodies: list[CompletionRequest] = []

    async def make(model: ServedModel) -> list[GenerationRequest]:
        try:
            async with asyncio.timeout(limit):
                body = await prepare(model)
        except TimeoutError:
            raise DeadlineExceededError("the request was not done within its time") from None
        bodies[:] = [body]
        prompts[:] = await read_prompts(body, model, server.settings.max_prompt_tokens)
        if body.logprobs is not None or body.prompt_logprobs is not None:
            await asyncio.to_thread(token_names, model.engine)
        grammar = None if wanted is None else await compile_grammar(model.engine, wanted[1], wanted[0])
        many = len(body.logit_bias) + len(body.stop_token_ids or ()) > LONG_TEXT
        # Reading prompts, compiling a grammar and building stop texts count in the request's time.
        left = time_left(limit, began)
        return await beside_if(many, lambda: make_requests(body, prompts, model, left, request_id, grammar))

    try:
        opening = submit(server.registry, model_name(server.registry, asked.model), make)
        model, generation = await (while_connected(request, opening) if wanted or long else opening)
    except FieldError:
        raise
    except InputError as error:  # The engine's own.
        raise _named(error) from None
    run: Run | None = None
    try:
        generation.watch(request)
        span = start_span(layout.operation, request.headers, model.name)
        run = Run(bodies[0], layout, model, prompts, generation, request_id, span, request.state)
        if asked.stream:  # At once: the engine has accepted it, and it may wait long for its first token.
            return EventStream(stream(run), server.settings.ping_seconds)
        while run.take(await generation.next()):
            pass
        answer = JSONResponse(run.whole())
    except BaseException as error:
        if run is None:
            generation.close()
        else:
            run.close(error)
        raise
    run.close()
    return answer


def _takes_long(body: CompletionRequest) -> bool:
    """Whether the client may be gone before its prompts are read."""
    return sum(len(given) for given in body.prompt if isinstance(given, str)) > LONG_TEXT


def model_name(registry: ModelRegistry, name: str | None) -> str:
    """`name`, or the first model's."""
    if name:
        return name
    names = registry.names()
    if not names:
        raise ModelNotReadyError("no model is loaded yet; try again when /health/ready says so")
    return names[0]


def _named(error: InputError) -> FieldError:
    """`error` with the field that its sentence names first."""
    words = re.findall(r"[a-z_]+", str(error))
    return FieldError(str(error), next((word for word in words if word in _ENGINE_FIELDS), None))


def _check(body: CompletionRequest, server: Server) -> None:
    """Refuse what is understood and not done here."""
    n = body.n or 1
    if body.suffix:
        raise FieldError("suffix is not supported: GPT-2 continues text only at its end; leave it out", "suffix")
    if body.best_of is not None and body.best_of != n:
        raise FieldError(f"best_of is {body.best_of}; only what n is, {n}, is supported", "best_of")
    if body.max_tokens == 0 and not body.echo and body.prompt_logprobs is None:
        raise FieldError("max_tokens is 0; that takes 'echo' or 'prompt_logprobs', or ask for at least 1", "max_tokens")
    if body.prompt_logprobs is not None and body.stream:
        raise FieldError("prompt_logprobs is not given in streams; leave out 'stream'", "prompt_logprobs")
    if len(body.prompt) > server.settings.max_prompts:
        raise FieldError(f"prompt has {len(body.prompt)} prompts; at most {server.settings.max_prompts}", "prompt")
    if len(body.prompt) * n > MAX_CHOICES:
        raise FieldError(f"{len(body.prompt)} prompts and n {n} make over {MAX_CHOICES} choices; lower n", "n")


def check_stream_options(body: SamplingFields) -> None:
    """Refuse options of a stream where there is none."""
    if body.stream_options is not None and not body.stream:
        raise FieldError("stream_options takes 'stream': true", "stream_options")


async def read_prompts(
    body: CompletionRequest, model: ServedModel, most: int | None, beside: bool = False
) -> list[Prompt]:
    """The prompts as token ids, each with room for `max_tokens` after it; `beside` is as for `encode_prompts`.

    Raises FieldError for one over `most` tokens, and ContextLengthError.
    """
    tokenizer, engine = model.engine.tokenizer, model.engine
    tokens = body.max_tokens if body.max_tokens is not None else body.default_max_tokens or 1
    texts = [given for given in body.prompt if isinstance(given, str)]
    try:
        encoded = iter(await encode_prompts(tokenizer, texts, engine.n_positions, beside))
    except TooLongError as error:
        raise ContextLengthError(engine.n_positions, f"{error}; shorten it", body.prompt_field) from None
    prompts = []
    for given in body.prompt:
        ids = tuple(next(encoded) if isinstance(given, str) else given)
        echo = None
        if body.echo:
            echo = given if isinstance(given, str) else tokenizer.decode(list(ids), skip_special_tokens=False)
        prompts.append(Prompt(ids or (engine.eos_token_id,), implied=not ids, echo=echo))
    room = tokens if _prompt_only(body, model) else max(tokens, 1)
    for prompt in prompts:
        length = len(prompt.ids)
        if most is not None and length > most:
            raise FieldError(f"a prompt has {length} tokens; this server takes at most {most}", body.prompt_field)
        if length + room > engine.n_positions:
            raise ContextLengthError(
                engine.n_positions,
                f"a prompt of {length} and max_tokens {tokens} do not fit; shorten one of them",
                body.prompt_field if length >= engine.n_positions else "max_tokens",
            )
    return prompts


def _prompt_only(body: CompletionRequest, model: ServedModel) -> bool:
    """Whether nothing is to be added to the prompts; an engine that cannot do so adds a token that nobody sees."""
    return body.max_tokens == 0 and "prompt_only" not in model.engine.unsupported


def _prompt_top(body: CompletionRequest) -> int | None:
    """How many of the likeliest tokens the engine is to report for each token of a prompt; None scores no prompt."""
    echoed = body.logprobs if body.echo else None
    asked = [top for top in (echoed, body.prompt_logprobs) if top is not None]
    return max(asked, default=None)


def make_requests(
    body: CompletionRequest,
    prompts: list[Prompt],
    model: ServedModel,
    limit: float | None,
    request_id: str,
    grammar: Grammar | None = None,
) -> list[GenerationRequest]:
    if len(body.logit_bias) > model.engine.vocab_size:
        raise FieldError(f"logit_bias has more ids than the vocabulary, {model.engine.vocab_size}", "logit_bias")
    tokens = body.max_tokens if body.max_tokens is not None else body.default_max_tokens
    if tokens is None:
        tokens = model.engine.n_positions - max(len(prompt.ids) for prompt in prompts)
    values = {each.name: getattr(body, each.wire) for each in DECLARATIONS.values()} | {
        "max_new_tokens": max(1, tokens),
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_k": None if body.top_k is None else max(0, body.top_k),
        "seed": secrets.randbelow(MAX_SEED) if body.seed is None else body.seed % (MAX_SEED + 1),
        "stop": tuple(body.stop),
        "logit_bias": tuple(body.logit_bias.items()),
        "stop_token_ids": tuple(body.stop_token_ids or ()),
    }
    if (body.min_tokens or 0) > tokens:
        raise FieldError(f"min_tokens is {body.min_tokens}, over max_tokens, {tokens}; lower it", "min_tokens")
    try:
        params = SamplingParams(**{name: value for name, value in values.items() if value is not None})
    except InputError as error:
        raise _named(error) from None
    return [
        GenerationRequest(
            prompt=prompt.ids,
            params=params,
            n=body.n or 1,
            logprobs=body.logprobs,
            prompt_logprobs=_prompt_top(body),
            prompt_only=_prompt_only(body, model),
            timeout=limit,
            request_id=request_id if len(prompts) == 1 else f"{request_id}-{index}",
            cache_salt=f"{CALLER.get()} {body.cache_salt or ''}",
            grammar=grammar,
        )
        for index, prompt in enumerate(prompts)
    ]


def _card(registry: ModelRegistry, name: str) -> dict[str, Any]:
    versions = registry.versions(name)
    newest = next((model for model in versions if model.state == State.AVAILABLE), versions[0])
    return {
        "id": name,
        "object": "model",
        "created": newest.created,
        "owned_by": "gpt2-bundle",
        "name": name,
        "ready": newest.state == State.AVAILABLE,
        "max_model_len": newest.bundle.manifest.model.n_positions,
        "example_prompt": newest.example_prompt,
        "example_message": newest.example_message,
        **model_status(registry, name),
    }


async def models(request: Request) -> Response:
    """GET /v1/models."""
    registry: ModelRegistry = request.app.state.server.registry
    return JSONResponse({"object": "list", "data": [_card(registry, name) for name in registry.names()]})


async def model(request: Request) -> Response:
    """GET /v1/models/{model}: OpenAI's card, or TensorFlow Serving's status alone, as both ask at this path.

    OpenAI's clients send a key and ask for JSON. TensorFlow Serving's do neither, and some fail at any other field.
    KServe's client reads `ready` in the card.
    """
    registry, name = request.app.state.server.registry, request.path_params["model"]
    for_card = is_openai_client(request.headers) or is_kserve_client(request.headers)
    return JSONResponse(_card(registry, name) if for_card else model_status(registry, name))


def routes() -> list[Route]:
    """The routes of this module."""
    return [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{model}", model),
    ]
