"""/openapi.json: every route of the server, described by OpenAPI 3.1 from the models that check its bodies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from serving import __version__
from serving.protocols.open_inference import schema as v2
from serving.protocols.openai import chat_schema, schema
from serving.protocols.tf_serving.signatures import SIGNATURES
from serving.server.middleware import OPEN_PATHS, openai_shaped
from serving.server.registry import ModelRegistry, ServedModel

_BINARY = "application/octet-stream"
_BYTES = {"type": "string", "format": "binary", "description": "The JSON, and behind it the tensors' bytes."}
_REF = "#/components/schemas/{model}"
_SHARED = "/v1/models/{model}"
"""OpenAI's and TensorFlow Serving's clients ask here, and each get their own kind of answer and of error."""
_PARAMETER = re.compile(r"\{([a-z_]+)\}")
# By method and path: the body, the answer, and the statuses beside 200, 401, 429 and 500.
_BODIES: dict[str, tuple[type[BaseModel] | None, type[BaseModel], tuple[int, ...]]] = {
    "POST /v1/completions": (schema.CompletionRequest, schema.Completion, (400, 404, 408, 413, 415, 503, 504)),
    "POST /v1/chat/completions": (
        chat_schema.ChatRequest,
        chat_schema.ChatCompletion,
        (400, 404, 408, 413, 415, 503, 504),
    ),
    "GET /v1/models": (None, schema.ModelList, ()),
    "GET /v1/models/{model}": (None, schema.ModelCard, (404,)),
    "POST /tokenize": (chat_schema.TokenizeRequest, schema.Tokens, (400, 404, 408, 413, 415, 503)),
    "POST /detokenize": (schema.DetokenizeRequest, schema.Text, (400, 404, 408, 413, 415, 503)),
}
for _path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
    for _name in ("generate", "generate_stream"):
        _BODIES[f"POST {_path}/{_name}"] = (v2.GenerateBody, v2.Generated, (400, 404, 408, 413, 415, 503, 504))
    _BODIES[f"POST {_path}/infer"] = (v2.InferBody, v2.InferAnswer, (400, 404, 408, 413, 415, 503, 504))


def examples(prompt: str, message: str | None) -> dict[str, dict[str, Any]]:
    """Example bodies by method and path, with a prompt that the served model may be asked to continue.

    `message` is one for a chat, None where the model knows no chats.
    """
    found: dict[str, dict[str, Any]] = {
        "POST /v1/completions": {"prompt": prompt, "max_tokens": 16, "temperature": 0.8, "seed": 7},
        "POST /tokenize": {"prompt": prompt},
        "POST /detokenize": {"tokens": [40, 41]},
        "POST /v2/models/{model}/generate": {"text_input": prompt, "parameters": {"max_tokens": 16, "seed": 7}},
        "POST /v2/models/{model}/infer": {
            "inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": [prompt]}],
            "parameters": {"signature_name": "tokenize"},
        },
    }
    if message is not None:
        chat = [{"role": "user", "content": message}]
        found["POST /v1/chat/completions"] = {"messages": chat, "max_tokens": 16, "temperature": 0.8, "seed": 7}
    return found


_SENTENCES = {
    400: "The request is wrong; the sentence names the field.",
    401: "No API key, or an unknown one.",
    404: "No such model or version.",
    408: "The body did not come in time.",
    413: "The body is over the limit.",
    415: "The body is packed in a way that is not unpacked here.",
    429: "The queue is full, or the caller asks too often; Retry-After is in seconds.",
    500: "A failure of the server's own; its log has it under the request's id.",
    503: "Draining, or not ready yet; Retry-After is in seconds.",
    504: "Not done within the request's time.",
}
_PREDICT = {
    "type": "object",
    "properties": {
        "signature_name": {"enum": list(SIGNATURES), "default": "serving_default"},
        "instances": {"type": "array", "description": "Rows: an object by input name for each, or the one input."},
        "inputs": {"description": "Columns: an object of lists by input name, or the one input's list."},
    },
    "oneOf": [{"required": ["instances"]}, {"required": ["inputs"]}],
}
_PLAIN_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}


def description(routes: Sequence[BaseRoute], models: Sequence[ServedModel] = ()) -> dict[str, Any]:
    """The OpenAPI document of `routes` of a server of `models`. Routes without schemas give any JSON."""
    names = sorted({model.name for model in models})
    given = examples(models[0].example_prompt, models[0].example_message) if models else examples("", None)
    bodies: set[type[BaseModel]] = {schema.Error, schema.ModelStatus}
    bodies |= {each for body, answer, _ in _BODIES.values() for each in (body, answer) if each}
    ordered = sorted(bodies, key=lambda model: model.__name__)
    _, definitions = models_json_schema([(model, "validation") for model in ordered], ref_template=_REF)
    paths: dict[str, Any] = {}
    for route in routes:
        if isinstance(route, Route) and route.include_in_schema:
            for method in sorted((route.methods or set()) - {"HEAD"}):
                example = given.get(f"{method} {route.path}")
                paths.setdefault(route.path, {})[method.lower()] = _operation(route, method, names, example)
    return {
        "openapi": "3.1.0",
        "info": {"title": "gpt2-bundle", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": {**definitions["$defs"], "PlainError": _PLAIN_ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route, method: str, names: Sequence[str], example: Any) -> dict[str, Any]:
    key = f"{method} {route.path}"
    body, answer, statuses = _BODIES.get(key, (None, None, _usual(route.path, method)))
    summary = (route.endpoint.__doc__ or route.name).strip().splitlines()[0]
    operation: dict[str, Any] = {
        "operationId": re.sub(r"[^a-z0-9]+", "_", key.lower()).strip("_"),
        "summary": summary,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": _parameter(name, names)}
            for name in _PARAMETER.findall(route.path)
        ],
        "responses": {"200": _ok(route.path, answer)},
    }
    if method == "POST":
        taken: dict[str, Any] = _PREDICT if route.path.endswith(":predict") else {"type": "object"}
        if body is not None:
            taken = {"$ref": _REF.format(model=body.__name__)}
        content: dict[str, Any] = {"schema": taken}
        if example is not None:
            content["example"] = example
        kinds = {"application/json": content}
        if body is v2.InferBody:
            kinds[_BINARY] = {"schema": _BYTES}
        operation["requestBody"] = {"required": route.path != "/v2/repository/index", "content": kinds}
    if route.path not in OPEN_PATHS:
        operation["security"] = [{}, {"key": []}]
        statuses = (401, 429, 500, *statuses)
    errors = ("Error", "PlainError") if openai_shaped(route.path) else ("PlainError",)
    content = {"application/json": {"schema": _any_of(*(errors if route.path == _SHARED else errors[:1]))}}
    for status in sorted(statuses):
        operation["responses"][str(status)] = {"description": _SENTENCES[status], "content": content}
    if route.path.endswith("/ready"):
        operation["responses"]["503"] = {"description": "Not ready; the reason is in the answer."}
    return operation


def _any_of(*names: str) -> dict[str, Any]:
    references = [{"$ref": _REF.format(model=name)} for name in names]
    return references[0] if len(references) == 1 else {"anyOf": references}


def _parameter(name: str, names: Sequence[str]) -> dict[str, Any]:
    if name == "version":
        return {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}
    return {"type": "string", "enum": list(names)} if names and name in ("name", "model") else {"type": "string"}


def _usual(path: str, method: str) -> tuple[int, ...]:
    """Statuses of a route that has no models of its own."""
    if method == "POST":
        return (400, 404, 408, 413, 415, 503, 504)
    return (400, 404) if "{" in path else ()


def _ok(path: str, answer: type[BaseModel] | None) -> dict[str, Any]:
    if path == "/metrics":
        return {"description": "Prometheus's text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    content: dict[str, Any] = {"application/json": {"schema": {}}}
    if answer is not None:
        names = [answer.__name__, *([schema.ModelStatus.__name__] if path == _SHARED else [])]
        content = {"application/json": {"schema": _any_of(*names)}}
    if answer is schema.Completion:
        content["text/event-stream"] = {
            "example": 'data: {"choices": [{"index": 0, "text": "..."}]}\n\ndata: [DONE]\n\n'
        }
    if answer is chat_schema.ChatCompletion:
        content["text/event-stream"] = {
            "example": 'data: {"choices": [{"index": 0, "delta": {"content": "..."}}]}\n\ndata: [DONE]\n\n'
        }
    if answer is v2.InferAnswer:
        content[_BINARY] = {"schema": _BYTES}
    if path.endswith("/generate_stream"):
        content = {"text/event-stream": {"example": 'data: {"model_name": "...", "text_output": "..."}\n\n'}}
    return {"description": "Done.", "content": content}


async def openapi(request: Request) -> Response:
    """This description."""
    registry: ModelRegistry = request.app.state.server.registry
    served = [registry.versions(name)[0] for name in registry.names()]
    return JSONResponse(description(request.app.routes, served))


def openapi_routes() -> list[Route]:
    """The routes of this module."""
    return [Route("/openapi.json", openapi)]
