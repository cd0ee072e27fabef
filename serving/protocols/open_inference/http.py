"""The Open Inference Protocol by HTTP (KServe's V2, Triton's extensions for binary tensors and generation)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serving.errors import InputError
from serving.protocols.json_requests import while_connected
from serving.protocols.open_inference import metadata as models
from serving.protocols.open_inference.infer import Answer, Stream, infer, open_stream
from serving.protocols.open_inference.schema import GenerateBody, InferBody, InputTensor
from serving.protocols.open_inference.signatures import GENERATE, InferRequest, refuse_parameters, signature_name
from serving.protocols.open_inference.tensors import from_raw, from_values, plain, to_raw, to_values
from serving.protocols.tf_serving.signatures import objects
from serving.server.errors import failure_of
from serving.server.event_queue import time_limit
from serving.server.event_stream import EventStream
from serving.server.middleware import log
from serving.server.request_bodies import parse_body, parse_object, read_bytes, reading
from serving.server.state import Server

HEADER_LENGTH = "Inference-Header-Content-Length"


def _server(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


async def server_metadata(request: Request) -> Response:
    """The server's name, version and extensions."""
    return JSONResponse(models.server_metadata())


async def server_live(request: Request) -> Response:
    """200 as long as the process answers at all."""
    return JSONResponse({"live": True})


async def server_ready(request: Request) -> Response:
    """200 once every model has generated something; 503 before, and while draining."""
    ready = _server(request).unready() is None
    return JSONResponse({"ready": ready}, 200 if ready else 503)


async def model_ready(request: Request) -> Response:
    """200 if the model, or the version, can answer; 503 if not."""
    name, version = _model_of(request)
    ready = models.is_ready(_server(request), name, version)
    return JSONResponse({"name": name, "ready": ready}, 200 if ready else 503)


async def model_metadata(request: Request) -> Response:
    """The tensors of a signature, of "generate" unless the query has `signature_name`."""
    return JSONResponse(models.model_metadata(_server(request), *_model_of(request), _asked_signature(request)))


async def model_config(request: Request) -> Response:
    """The model as Triton's model configuration has it."""
    return JSONResponse(models.model_config(_server(request), *_model_of(request), _asked_signature(request)))


async def statistics(request: Request) -> Response:
    """How many requests the engine had, and how long they took, in nanoseconds."""
    return JSONResponse(models.statistics(_server(request), *_model_of(request)))


async def repository_index(request: Request) -> Response:
    """All models and versions with their states."""
    data = await read_bytes(request)
    asked = parse_object(data).get("ready", False) if data else False
    return JSONResponse(models.repository_index(_server(request), asked is True))


async def infer_tensors(request: Request) -> Response:
    """Run a signature on tensors, in JSON or as bytes after it."""
    body, asked = await _infer_request(request)
    answer = await while_connected(request, infer(_server(request), asked))
    _note(request, answer.model.name, answer.model.version)
    return _tensors_response(body, answer)


async def generate(request: Request) -> Response:
    """Continue a text, or each of several."""
    body, asked = await _generate_request(request)
    if asked.stream:
        raise InputError("stream is true; ask generate_stream for a stream")
    answer = await while_connected(request, infer(_server(request), asked))
    _note(request, answer.model.name, answer.model.version)
    return JSONResponse(_generated(body, answer))


async def generate_stream(request: Request) -> Response:
    """Continue a text as server-sent events, one for each new part."""
    body, asked = await _generate_request(request)
    if asked.stream is False:
        answer = await while_connected(request, infer(_server(request), asked))
        return EventStream(_events_of(_event(_generated(body, answer))))
    stream = await open_stream(_server(request), asked)
    stream.generation.watch(request)
    return EventStream(_events(request, body, stream), _server(request).settings.ping_seconds)


async def _events_of(*events: bytes) -> AsyncGenerator[bytes, None]:
    for event in events:
        yield event


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


async def _events(request: Request, body: GenerateBody, stream: Stream) -> AsyncGenerator[bytes, None]:
    try:
        async with contextlib.aclosing(stream.pieces()) as pieces:
            async for piece in pieces:
                yield _event(_generated(body, piece))
    except Exception as error:
        failure = failure_of(error)
        if failure.internal:
            log.error("a stream failed", exc_info=error, extra={"request_id": request.state.request_id})
        yield _event({"error": failure.message})
    finally:
        _note(request, stream.model.name, stream.model.version)


def _generated(body: GenerateBody, answer: Answer) -> dict[str, Any]:
    """The outputs by name; those of a single text without a list around them."""
    outputs = {name: plain(array.tolist()) for name, array in answer.outputs.items()}
    if isinstance(body.text_input, str):
        outputs = {name: rows[0] for name, rows in outputs.items()}
    frame = {"model_name": answer.model.name, "model_version": str(answer.model.version), **outputs}
    return {"id": body.id, **frame} if body.id else frame


async def _generate_request(request: Request) -> tuple[GenerateBody, InferRequest]:
    data = await read_bytes(request)
    body = await reading(data, lambda: parse_body(data, GenerateBody))
    parameters = {**body.parameters, **(body.model_extra or {})}
    if signature_name(parameters.get("signature_name", GENERATE)) != GENERATE:
        raise InputError("generate has one signature; ask infer for another")
    texts = [body.text_input] if isinstance(body.text_input, str) else body.text_input
    inputs = {"text_input": objects([text.encode("utf-8", "replace") for text in texts])}
    return body, _asked(request, inputs, parameters)


async def _infer_request(request: Request) -> tuple[InferBody, InferRequest]:
    data = await read_bytes(request)
    body, inputs = await reading(data, lambda: _read_infer(data, request.headers.get(HEADER_LENGTH)))
    outputs = tuple(output.name for output in body.outputs)
    for each in (*body.inputs, *body.outputs):
        refuse_parameters(each.name, each.parameters)
    return body, _asked(request, inputs, body.parameters, outputs)


def _read_infer(data: bytes, length: str | None) -> tuple[InferBody, dict[str, Any]]:
    """The JSON, which has `length` bytes where a header says so, and the inputs in it and after it."""
    size = len(data)
    if length is not None:
        if not (length.isascii() and length.isdigit() and len(length) < 12 and int(length) <= len(data)):
            raise InputError(f"the header {HEADER_LENGTH} is {length[:40]!r}, and the body has {len(data)} bytes")
        size = int(length)
    body = parse_body(data[:size], InferBody)
    binary = memoryview(data)[size:]
    inputs = {}
    for tensor in body.inputs:
        if tensor.name in inputs:
            raise InputError(f"the input {tensor.name[:80]} is there twice")
        inputs[tensor.name], binary = _array(tensor, binary)
    if len(binary):
        raise InputError(f"the body has {len(binary)} bytes after those that the inputs declare")
    return body, inputs


def _array(tensor: InputTensor, binary: memoryview) -> tuple[Any, memoryview]:
    """The tensor, and what its bytes leave of `binary`."""
    name = tensor.name[:80]
    size = tensor.parameters.get("binary_data_size")
    if size is None:
        if tensor.data is None:
            raise InputError(f"{name} has neither data nor the parameter binary_data_size")
        return from_values(name, tensor.datatype, tensor.shape, tensor.data), binary
    if tensor.data is not None:
        raise InputError(f"{name} has both data and the parameter binary_data_size; leave one out")
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(binary):
        raise InputError(f"{name} says that it has {str(size)[:40]} bytes, and there are {len(binary)} after the JSON")
    return from_raw(name, tensor.datatype, tensor.shape, bytes(binary[:size])), binary[size:]


def _tensors_response(body: InferBody, answer: Answer) -> Response:
    """The outputs as JSON, or as bytes after it where the request wants that."""
    everywhere = body.parameters.get("binary_data_output", False) is True
    wanted = {output.name: output.parameters.get("binary_data", everywhere) is True for output in body.outputs}
    outputs, blobs = [], []
    for name, array in answer.outputs.items():
        datatype = answer.specs[name].datatype
        described: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if wanted.get(name, everywhere):
            blobs.append(to_raw(array))
            described["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            described["data"] = to_values(array)
        outputs.append(described)
    head: dict[str, Any] = {"model_name": answer.model.name, "model_version": str(answer.model.version)}
    if body.id:
        head["id"] = body.id
    head["outputs"] = outputs
    if not blobs:
        return JSONResponse(head)
    text = json.dumps(head).encode()
    return Response(
        b"".join([text, *blobs]), media_type="application/octet-stream", headers={HEADER_LENGTH: str(len(text))}
    )


def _asked(
    request: Request, inputs: dict[str, Any], parameters: dict[str, Any], outputs: tuple[str, ...] = ()
) -> InferRequest:
    limit = time_limit(request, _server(request).settings.request_timeout)
    name, version = _model_of(request)
    request_id = request.state.request_id
    return InferRequest(name, version, inputs, parameters, outputs, limit, request_id, request.headers)


def _model_of(request: Request) -> tuple[str, str]:
    return request.path_params.get("model", ""), request.path_params.get("version", "")


def _asked_signature(request: Request) -> str:
    return signature_name(request.query_params.get("signature_name", GENERATE))


def _note(request: Request, name: str, version: int) -> None:
    request.state.log = {"model": name, "version": version}


def routes() -> list[Route]:
    """The routes of this module. Handlers raise; the application turns errors into answers."""
    made = [
        Route("/v2", server_metadata),
        Route("/v2/health/live", server_live),
        Route("/v2/health/ready", server_ready),
        Route("/v2/repository/index", repository_index, methods=["POST"]),
        Route("/v2/models/stats", statistics),
    ]
    for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        made += [
            Route(path, model_metadata),
            Route(f"{path}/ready", model_ready),
            Route(f"{path}/config", model_config),
            Route(f"{path}/stats", statistics),
            Route(f"{path}/infer", infer_tensors, methods=["POST"]),
            Route(f"{path}/generate", generate, methods=["POST"]),
            Route(f"{path}/generate_stream", generate_stream, methods=["POST"]),
        ]
    return made
