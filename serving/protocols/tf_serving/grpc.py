"""TensorFlow Serving's PredictionService and ModelService over the engine, without TensorFlow."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.errors import InputError
from serving.protobuf.tables import read_message
from serving.protobuf.tf_serving import MESSAGES, MODEL_SERVICE, PREDICTION_SERVICE, SIGNATURE_MAP_URL
from serving.protocols.model_status import model_status
from serving.protocols.tf_serving.increments import STREAMED, Increments, open_increments
from serving.protocols.tf_serving.signatures import SIGNATURES, Arrays, Call, Tensor, find, run
from serving.server.errors import UnsupportedCallError
from serving.server.event_queue import with_model
from serving.server.grpc_middleware import Timeout, headers_of, request_id
from serving.server.registry import ServedModel, State
from serving.server.state import Server
from serving.server.tracing import COMPLETION, start_span

# tensorflow/core/framework/types.proto
_NUMBERS = {"DT_FLOAT": 1, "DT_INT32": 3, "DT_STRING": 7, "DT_INT64": 9}
_KINDS: dict[int, tuple[Any, str]] = {
    1: (np.float32, "float_val"),
    2: (np.float64, "double_val"),
    3: (np.int32, "int_val"),
    4: (np.uint8, "int_val"),
    5: (np.int16, "int_val"),
    6: (np.int8, "int_val"),
    9: (np.int64, "int64_val"),
    10: (np.bool_, "bool_val"),
    22: (np.uint32, "uint32_val"),
    23: (np.uint64, "uint64_val"),
}
_STRING = 7
_MAX_ELEMENTS = 1 << 20
"""Of a tensor that may have fewer values than its shape says."""
_UNKNOWN = 2  # google.rpc.Code of a version that says what is wrong with it.
# PredictStreamedOptions.RequestState. Its others, NONE and END_SPLIT, say that the request is whole.
_SPLIT, _CANCEL = 1, 3


@dataclass(frozen=True)
class _Asked:
    """A PredictRequest: signature, model and version, outputs wanted, inputs."""

    name: str
    model: tuple[str, int | None]
    wanted: list[str]
    inputs: Arrays

    def response(self, model: ServedModel, outputs: Arrays) -> Any:
        """The PredictResponse of `outputs` as `model` made them."""
        response = MESSAGES["PredictResponse"]()
        _fill_spec(response.model_spec, model.name, model.version, self.name)
        for key in self.wanted:
            fill(response.outputs[key], outputs[key], find(self.name).outputs[key])
        return response


class TensorFlowServing:
    """The two services' methods. They raise; `serving.entrypoints.grpc_server` turns errors into statuses."""

    def __init__(self, server: Server, timeout: Timeout) -> None:
        """`timeout` says how many seconds a call, given its context, may take."""
        self._server, self._timeout = server, timeout

    def methods(self) -> dict[str, dict[str, tuple[Any, Any, Any]]]:
        """For each service its methods: (handler, request class, response class)."""
        empty = MESSAGES["Empty"]
        refused = {
            name: (_unimplemented(name, "use Predict"), empty, empty)
            for name in ("Classify", "Regress", "MultiInference")
        }
        return {
            PREDICTION_SERVICE: {
                "Predict": (self.predict, MESSAGES["PredictRequest"], MESSAGES["PredictResponse"]),
                "GetModelMetadata": (
                    self.metadata,
                    MESSAGES["GetModelMetadataRequest"],
                    MESSAGES["GetModelMetadataResponse"],
                ),
                **refused,
            },
            MODEL_SERVICE: {
                "GetModelStatus": (self.status, MESSAGES["GetModelStatusRequest"], MESSAGES["GetModelStatusResponse"]),
                "HandleReloadConfigRequest": (
                    _unimplemented("HandleReloadConfigRequest", "the server follows its folder with --watch"),
                    empty,
                    empty,
                ),
            },
        }

    async def predict(self, request: Any, context: Any) -> Any:
        asked = self._read(request)

        def work(model: ServedModel) -> Coroutine[Any, Any, Arrays]:
            return run(asked.name, self._call(model, context), asked.inputs)

        model, outputs = await with_model(self._server.registry, *asked.model, work)
        return asked.response(model, outputs)

    async def predict_streamed(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """PredictStreamed: one request, answered in increments; `serving.protocols.tf_serving.increments` says how.

        A signature that has none, and a request for a single response, is answered as by Predict. The stream ends when
        its client cancels or goes away.
        """
        request = await _first(requests)
        if request.predict_streamed_options.return_single_response or (
            (request.model_spec.signature_name or "serving_default") not in STREAMED
        ):
            await context.write(await self.predict(request, context))
            return
        asked = self._read(request)

        def work(model: ServedModel) -> Coroutine[Any, Any, Increments]:
            return open_increments(asked.name, self._call(model, context), asked.inputs)

        model, increments = await with_model(self._server.registry, *asked.model, work)
        reading = asyncio.ensure_future(_end_early(requests, increments))
        try:
            async with contextlib.aclosing(increments.outputs()) as every:
                async for outputs in every:
                    await context.write(asked.response(model, outputs))
            if reading.done():
                reading.result()
        finally:
            reading.cancel()
            increments.close()

    def _read(self, request: Any) -> _Asked:
        """What is asked for, checked. Raises InputError and what `ModelRegistry.get` raises."""
        name = request.model_spec.signature_name
        signature = find(name)
        model_name, version = request.model_spec.name, _version(request.model_spec)
        self._server.registry.get(model_name, version)  # A missing model is said before wrong inputs.
        wanted = list(request.output_filter) or list(signature.outputs)
        unknown = [key for key in wanted if key not in signature.outputs]
        if unknown:
            raise InputError(f"the signature has no output {unknown[0][:80]!r}; it has {', '.join(signature.outputs)}")
        inputs = {key: array_of(key, tensor) for key, tensor in request.inputs.items()}
        return _Asked(name or "serving_default", (model_name, version), wanted, inputs)

    def _call(self, model: ServedModel, context: Any) -> Call:
        span = functools.partial(start_span, COMPLETION, headers_of(context), model.name)
        most = (self._server.settings.max_prompts, self._server.settings.max_prompt_tokens)
        return Call(model.engine, self._timeout(context), request_id(), *most, span)

    async def metadata(self, request: Any, context: Any) -> Any:
        fields = list(request.metadata_field)
        if fields != ["signature_def"]:
            raise InputError('metadata_field must be "signature_def"')
        model = self._server.registry.get(request.model_spec.name, _version(request.model_spec))
        signatures = MESSAGES["SignatureDefMap"]()
        for name, signature in SIGNATURES.items():
            definition = signatures.signature_def[name]
            definition.method_name = "tensorflow/serving/predict"
            for side, tensors in ((definition.inputs, signature.inputs), (definition.outputs, signature.outputs)):
                for key, tensor in tensors.items():
                    side[key].name, side[key].dtype = f"{name}_{key}:0", _NUMBERS[tensor.type_name]
                    for _ in range(tensor.rank):
                        side[key].tensor_shape.dim.add(size=-1)
        response = MESSAGES["GetModelMetadataResponse"]()
        _fill_spec(response.model_spec, model.name, model.version, "")
        packed = response.metadata["signature_def"]
        packed.type_url, packed.value = SIGNATURE_MAP_URL, signatures.SerializeToString()
        return response

    async def status(self, request: Any, context: Any) -> Any:
        response = MESSAGES["GetModelStatusResponse"]()
        states = model_status(self._server.registry, request.model_spec.name, _version(request.model_spec))
        for each in states["model_version_status"]:
            added = response.model_version_status.add(version=int(each["version"]), state=int(State[each["state"]]))
            added.status.error_message = each["status"]["error_message"]
            added.status.error_code = _UNKNOWN if added.status.error_message else 0
        return response


async def _first(requests: AsyncIterator[bytes]) -> Any:
    """The request of a stream. Raises InputError if there is none, and UnsupportedCallError for one in parts.

    A message without inputs announces the request, as newer clients do, and is passed over.
    """
    async for data in requests:
        request = MESSAGES["PredictRequest"]()
        read_message(data, request)
        if request.predict_streamed_options.request_state == _SPLIT:
            raise UnsupportedCallError("requests in parts (SPLIT) are not offered here; send the inputs in one message")
        if request.inputs or request.model_spec.signature_name:
            return request
    raise InputError("PredictStreamed needs a request with inputs")


async def _end_early(requests: AsyncIterator[bytes], increments: Increments) -> None:
    """End the generation when the client cancels by a message. Raises InputError for a second request."""
    async for data in requests:
        request = MESSAGES["PredictRequest"]()
        increments.cancel()
        read_message(data, request)
        if request.predict_streamed_options.request_state != _CANCEL:
            raise InputError("PredictStreamed takes one request in a stream; open another for the next")
        return


def _unimplemented(name: str, instead: str) -> Any:
    async def refuse(request: Any, context: Any) -> Any:
        raise UnsupportedCallError(f"{name} is not offered here; {instead}")

    return refuse


def _version(spec: Any) -> int | None:
    choice = spec.WhichOneof("choice")
    if choice == "version_label":
        raise InputError(f"Unrecognized servable version label: {spec.version_label[:80]}; name a version instead")
    # 0, which no version here has, is the newest, as by REST.
    return (spec.version.value or None) if choice else None


def _fill_spec(spec: Any, name: str, version: int, signature: str) -> None:
    spec.name, spec.version.value, spec.signature_name = name, version, signature


def array_of(name: str, tensor: Any) -> NDArray[Any]:
    """A TensorProto as an array. Raises InputError.

    Values left out at its end repeat the last one, and without any all are zeros or empty, as TensorFlow reads it.
    """
    shape = [dim.size for dim in tensor.tensor_shape.dim]
    if tensor.tensor_shape.unknown_rank or any(size < 0 for size in shape) or len(shape) > 8:
        raise InputError(f"{name} has no shape that a tensor can have")
    count = int(np.prod(shape, dtype=object))
    if count > _MAX_ELEMENTS and not tensor.tensor_content:
        raise InputError(f"{name} says that it has {count} values; it may have {_MAX_ELEMENTS}")
    if tensor.dtype == _STRING:
        kind: Any = np.object_
        values: Any = np.empty(len(tensor.string_val), np.object_)
        values[:] = list(tensor.string_val)
    elif tensor.dtype in _KINDS:
        kind, field = _KINDS[tensor.dtype]
        if tensor.tensor_content:
            if len(tensor.tensor_content) != count * np.dtype(kind).itemsize:
                raise InputError(f"{name} has {len(tensor.tensor_content)} bytes, which is not what its shape needs")
            return np.frombuffer(tensor.tensor_content, np.dtype(kind).newbyteorder("<")).reshape(shape)
        values = np.array(getattr(tensor, field)).astype(kind) if len(getattr(tensor, field)) else np.empty(0, kind)
    else:
        raise InputError(f"{name} has a type, number {tensor.dtype}, that no signature takes")
    if len(values) > count:
        raise InputError(f"{name} has {len(values)} values, and its shape needs {count}")
    if not len(values):
        return np.full(shape, b"" if kind is np.object_ else 0, kind)
    return np.concatenate([values, np.repeat(values[-1:], count - len(values))]).astype(kind).reshape(shape)


def fill(message: Any, value: NDArray[Any], tensor: Tensor) -> None:
    """Write an array into a TensorProto."""
    message.dtype = _NUMBERS[tensor.type_name]
    for size in value.shape:
        message.tensor_shape.dim.add(size=size)
    if tensor.kind == "string":
        message.string_val.extend(value.tolist())
    else:
        message.tensor_content = np.ascontiguousarray(value).astype(np.dtype(tensor.dtype).newbyteorder("<")).tobytes()
