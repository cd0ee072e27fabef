"""The Open Inference Protocol's gRPC service (Triton's GRPCInferenceService) over the engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray

from serving.engine.api import DrainingError
from serving.errors import InputError
from serving.protobuf.open_inference import CONFIG_TYPES, MESSAGES
from serving.protobuf.tables import read_message
from serving.protocols.open_inference import metadata as models
from serving.protocols.open_inference.infer import Answer, infer, open_stream
from serving.protocols.open_inference.schema import MAX_TENSORS
from serving.protocols.open_inference.signatures import GENERATE, InferRequest, refuse_parameters
from serving.protocols.open_inference.tensors import TYPES, checked_size, from_raw, to_raw
from serving.server.errors import failure_of
from serving.server.grpc_middleware import Timeout, headers_of, request_id
from serving.server.request_bodies import MAX_VALUES
from serving.server.state import Server

_CONTENTS: dict[str, tuple[str, Any]] = {
    "BOOL": ("bool_contents", np.bool_),
    "INT8": ("int_contents", np.int32),
    "INT16": ("int_contents", np.int32),
    "INT32": ("int_contents", np.int32),
    "INT64": ("int64_contents", np.int64),
    "UINT8": ("uint_contents", np.uint32),
    "UINT16": ("uint_contents", np.uint32),
    "UINT32": ("uint_contents", np.uint32),
    "UINT64": ("uint64_contents", np.uint64),
    "FP32": ("fp32_contents", np.float32),
    "FP64": ("fp64_contents", np.float64),
    "BYTES": ("bytes_contents", np.object_),
}
"""By datatype, the field of InferTensorContents and numpy's type of what is in it."""
_AT_ONCE = 256
"""Requests of one stream that are worked on; the next ones are read when these are answered."""
_LOOK_SECONDS = 0.25
"""How often a stream looks whether the server drains; one that its client leaves open would hold the server up."""
log = logging.getLogger("gpt2_bundle.server")
Methods = dict[str, tuple[Any, Any]]


class OpenInference:
    """The service's methods. The unary ones raise; `serving.entrypoints.grpc_server` turns errors into statuses."""

    def __init__(self, server: Server, timeout: Timeout, admit: Callable[[Any], None]) -> None:
        """`timeout` says how many seconds a call, given its context, may take; `admit` counts a request of a stream
        and raises if it may not be."""
        self._server, self._timeout, self._admit = server, timeout, admit

    def open_methods(self) -> Methods:
        """The methods that need no key: (handler, request class)."""
        return {
            "ServerLive": (self.server_live, MESSAGES["ServerLiveRequest"]),
            "ServerReady": (self.server_ready, MESSAGES["ServerReadyRequest"]),
        }

    def methods(self) -> Methods:
        """The others that take one message and give one."""
        return {
            "ModelReady": (self.model_ready, MESSAGES["ModelReadyRequest"]),
            "ServerMetadata": (self.server_metadata, MESSAGES["ServerMetadataRequest"]),
            "ModelMetadata": (self.model_metadata, MESSAGES["ModelMetadataRequest"]),
            "ModelConfig": (self.model_config, MESSAGES["ModelConfigRequest"]),
            "ModelStatistics": (self.statistics, MESSAGES["ModelStatisticsRequest"]),
            "RepositoryIndex": (self.repository_index, MESSAGES["RepositoryIndexRequest"]),
            "ModelInfer": (self.infer, MESSAGES["ModelInferRequest"]),
        }

    async def server_live(self, request: Any, context: Any) -> Any:
        return MESSAGES["ServerLiveResponse"](live=True)

    async def server_ready(self, request: Any, context: Any) -> Any:
        return MESSAGES["ServerReadyResponse"](ready=self._server.unready() is None)

    async def model_ready(self, request: Any, context: Any) -> Any:
        ready = models.is_ready(self._server, request.name, request.version)
        return MESSAGES["ModelReadyResponse"](ready=ready)

    async def server_metadata(self, request: Any, context: Any) -> Any:
        return _message("ServerMetadataResponse", models.server_metadata())

    async def model_metadata(self, request: Any, context: Any) -> Any:
        return _message("ModelMetadataResponse", models.model_metadata(self._server, request.name, request.version))

    async def model_config(self, request: Any, context: Any) -> Any:
        config = models.model_config(self._server, request.name, request.version)
        for tensor in (*config["input"], *config["output"]):
            name = tensor["data_type"].removeprefix("TYPE_")
            tensor["data_type"] = CONFIG_TYPES["BYTES" if name == "STRING" else name]
        return _message("ModelConfigResponse", {"config": config})

    async def statistics(self, request: Any, context: Any) -> Any:
        return _message("ModelStatisticsResponse", models.statistics(self._server, request.name, request.version))

    async def repository_index(self, request: Any, context: Any) -> Any:
        return _message("RepositoryIndexResponse", {"models": models.repository_index(self._server, request.ready)})

    async def infer(self, request: Any, context: Any) -> Any:
        answer = await infer(self._server, self._asked(request, context))
        return _response(request, answer)

    async def stream(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """ModelStreamInfer: runs each request as it arrives, and answers with one response or several partial ones.

        A failed request gets its error message, and the stream continues. When the client goes, all
        of it is cancelled; when the server drains, what was read is answered. Raises DrainingError then.
        """
        writing, room = asyncio.Lock(), asyncio.Semaphore(_AT_ONCE)
        draining = asyncio.ensure_future(self._draining())
        try:
            async with asyncio.TaskGroup() as group:
                while (data := await _unless(draining, anext(requests, None))) is not None:
                    await room.acquire()
                    task = group.create_task(self._answer(data, context, writing))
                    task.add_done_callback(lambda _: room.release())
            if draining.done():
                raise DrainingError("the server is shutting down; ask another one or try again")
        finally:
            draining.cancel()

    async def _draining(self) -> None:
        while not self._server.draining:
            await asyncio.sleep(_LOOK_SECONDS)

    async def _answer(self, data: bytes, context: Any, writing: asyncio.Lock) -> None:
        async def write(message: Any) -> None:
            async with writing:  # gRPC takes one message at a time.
                await context.write(message)

        request = MESSAGES["ModelInferRequest"]()
        wrapped = MESSAGES["ModelStreamInferResponse"]
        try:
            self._admit(context)
            read_message(data, request)
            asked = self._asked(request, context)
            if asked.signature != GENERATE or asked.stream is False:
                await write(wrapped(infer_response=_response(request, await infer(self._server, asked), streamed=True)))
                return
            stream = await open_stream(self._server, asked)
            async with contextlib.aclosing(stream.pieces()) as pieces:
                async for piece in pieces:
                    await write(wrapped(infer_response=_response(request, piece, streamed=True)))
        except Exception as error:
            failure = failure_of(error)
            if failure.internal:
                log.error("a request of a stream failed", exc_info=error, extra={"request_id": request_id()})
            refused = wrapped(error_message=failure.message)
            refused.infer_response.model_name, refused.infer_response.id = request.model_name, request.id
            await write(refused)

    def _asked(self, request: Any, context: Any) -> InferRequest:
        for what, tensors in (("inputs", request.inputs), ("outputs", request.outputs)):
            if len(tensors) > MAX_TENSORS:  # Before any of them is looked at.
                raise InputError(f"the request has {len(tensors)} {what}; it may have {MAX_TENSORS}")
        outputs = tuple(output.name for output in request.outputs)
        for tensor in (*request.inputs, *request.outputs):
            refuse_parameters(tensor.name, tensor.parameters)
        return InferRequest(
            request.model_name,
            request.model_version,
            _inputs(request),
            {name: _value(name, parameter) for name, parameter in request.parameters.items()},
            outputs,
            self._timeout(context),
            request_id(),
            headers_of(context),
        )


async def _unless(ended: asyncio.Future[None], coming: Awaitable[bytes | None]) -> bytes | None:
    """What is `coming`; None if `ended` is first."""
    waiting = asyncio.ensure_future(coming)
    try:
        await asyncio.wait((ended, waiting), return_when=asyncio.FIRST_COMPLETED)
        return waiting.result() if waiting.done() else None
    finally:
        waiting.cancel()


def _message(name: str, fields: dict[str, Any]) -> Any:
    return json_format.ParseDict(fields, MESSAGES[name]())


def _value(name: str, parameter: Any) -> Any:
    kind = parameter.WhichOneof("choice")
    if kind is None:
        raise InputError(f"the parameter {name[:80]} has no value")
    return getattr(parameter, kind)


def _inputs(request: Any) -> dict[str, NDArray[Any]]:
    raw: Sequence[bytes] = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InputError(f"there are {len(raw)} raw_input_contents and {len(request.inputs)} inputs; send one for each")
    inputs = {}
    for index, tensor in enumerate(request.inputs):
        name = tensor.name[:80]
        if tensor.name in inputs:
            raise InputError(f"the input {name} is there twice")
        if not raw:
            inputs[tensor.name] = _typed(name, tensor)
        elif tensor.HasField("contents"):
            raise InputError(f"{name} has contents and raw_input_contents; leave one out")
        else:
            inputs[tensor.name] = from_raw(name, tensor.datatype, list(tensor.shape), raw[index])
    return inputs


def _typed(name: str, tensor: Any) -> NDArray[Any]:
    """A tensor whose values are in the field of `contents` for its type."""
    if tensor.datatype not in _CONTENTS:
        raise InputError(f"{name} has the datatype {tensor.datatype[:40]!r}; contents have {', '.join(_CONTENTS)}")
    field, wide = _CONTENTS[tensor.datatype]
    values = getattr(tensor.contents, field)
    size = checked_size(name, tensor.datatype, tensor.shape)
    if len(values) != size or size > MAX_VALUES:
        raise InputError(f"{name} has {len(values)} values, its shape needs {size}, and contents may have {MAX_VALUES}")
    held = np.empty(len(values), wide)
    held[:] = values
    array = held.astype(TYPES[tensor.datatype])
    if not np.array_equal(array, held, equal_nan=wide in (np.float32, np.float64)):
        raise InputError(f"{name} has values that {tensor.datatype} does not hold")
    # Its raw bytes are checked against the shape as those of others are.
    return from_raw(name, tensor.datatype, list(tensor.shape), to_raw(array))


def _response(request: Any, answer: Answer, streamed: bool = False) -> Any:
    """The outputs, raw if the inputs were, otherwise in typed fields."""
    response = MESSAGES["ModelInferResponse"](
        model_name=answer.model.name, model_version=str(answer.model.version), id=request.id
    )
    if streamed:
        response.parameters["triton_final_response"].bool_param = answer.final
    for name, array in answer.outputs.items():
        datatype = answer.specs[name].datatype
        output = response.outputs.add(name=name, datatype=datatype, shape=array.shape)
        if request.raw_input_contents:
            response.raw_output_contents.append(to_raw(array))
        else:
            getattr(output.contents, _CONTENTS[datatype][0]).extend(array.reshape(-1).tolist())
    return response
