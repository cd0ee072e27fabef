"""TensorFlow Serving's gRPC services. Needs grpcio and protobuf, not TensorFlow."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np

from serving.clients.rest_transport import bearer
from serving.clients.wrong_answers import MAX_ANSWER, reading
from serving.errors import InputError, RuntimeMissingError, ServerError, cut

# tensorflow/core/framework/types.proto
_DTYPES = {1: np.float32, 2: np.float64, 3: np.int32, 4: np.uint8, 6: np.int8, 9: np.int64, 10: np.bool_}
_NUMBERS = {np.dtype(kind): number for number, kind in _DTYPES.items()}
_FIELDS = {1: "float_val", 2: "double_val", 3: "int_val", 4: "int_val", 6: "int_val", 9: "int64_val", 10: "bool_val"}
_STRING = 7
_PROTOCOL = "TensorFlow Serving's gRPC API"


# tensorflow_serving/apis/get_model_status.proto
_STATES = {0: "UNKNOWN", 10: "START", 20: "LOADING", 30: "AVAILABLE", 40: "UNLOADING", 50: "END"}


class GrpcTransport:
    """One model at `address`, such as 127.0.0.1:8500.

    Raises RuntimeMissingError without the extra `client`, and InputError for what is not an address.
    """

    def __init__(self, address: str, model: str, api_key: str | None = None) -> None:
        try:
            import grpc

            from serving.protobuf import tf_serving as tf_messages
            from serving.protobuf.tables import read_message
        except ImportError as error:
            raise RuntimeMissingError(
                f"gRPC needs {error.name}, which is not installed; pip install 'gpt2-bundle[client]', or use --url"
            ) from None
        host, _, port = address.rpartition(":")
        if not (host and host.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise InputError(f"{address!r} is not an address of a gRPC server; write it as 127.0.0.1:8500")
        self._grpc, self._address, self._model = grpc, address, model
        self._call_metadata = None if api_key is None else (("authorization", bearer(api_key)),)
        self._messages, self._read_message = tf_messages.MESSAGES, read_message
        self._dtypes = {number: f"DT_{name}" for number, name in tf_messages.DTYPES.items()}
        # A long answer may pass gRPC's default of 4 MiB.
        channel = grpc.insecure_channel(address, [("grpc.max_receive_message_length", MAX_ANSWER)])

        def method(service: str, name: str, messages: str) -> Callable[..., Any]:
            stub: Callable[..., Any] = channel.unary_unary(
                f"/{service}/{name}",
                request_serializer=self._messages[f"{messages}Request"].SerializeToString,
                response_deserializer=self._messages[f"{messages}Response"].FromString,
            )
            return stub

        self._predict = method(tf_messages.PREDICTION_SERVICE, "Predict", "Predict")
        self._metadata = method(tf_messages.PREDICTION_SERVICE, "GetModelMetadata", "GetModelMetadata")
        self._predict_streamed = channel.stream_stream(
            f"/{tf_messages.PREDICTION_SERVICE}/PredictStreamed",
            request_serializer=self._messages["PredictRequest"].SerializeToString,
            response_deserializer=self._messages["PredictResponse"].FromString,
        )
        self._status = method(tf_messages.MODEL_SERVICE, "GetModelStatus", "GetModelStatus")
        self._known: dict[str, Any] | None = None

    def predict(self, signature: str, inputs: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        return self._outputs(self._ask(self._predict, self._request(signature, inputs), timeout))

    def predict_streamed(
        self, signature: str, inputs: Mapping[str, Any], timeout: float
    ) -> Generator[dict[str, Any], None, None]:
        """Outputs of each increment of PredictStreamed; `timeout` seconds for each. Closing it ends the call.

        Raises ServerError, with the code UNIMPLEMENTED where the server has no such call.
        """
        call = self._predict_streamed(iter([self._request(signature, inputs)]), metadata=self._call_metadata)
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def read() -> None:
            try:
                for response in call:
                    answers.put(response)
                answers.put(None)
            except self._grpc.RpcError as error:
                answers.put(error)

        threading.Thread(target=read, name="stream", daemon=True).start()
        try:
            while (answer := answers.get(timeout=timeout)) is not None:
                if isinstance(answer, self._grpc.RpcError):
                    raise self._failure(answer)
                yield self._outputs(answer)
        except queue.Empty:
            raise ServerError(f"{self._address}: nothing came within {timeout:g} s", "DEADLINE_EXCEEDED") from None
        finally:
            call.cancel()

    def metadata(self, timeout: float) -> dict[str, Any]:
        request = self._messages["GetModelMetadataRequest"](metadata_field=["signature_def"])
        request.model_spec.name = self._model
        response = self._ask(self._metadata, request, timeout)
        signatures = self._messages["SignatureDefMap"]()
        with reading(self._address, _PROTOCOL):
            self._read_message(response.metadata["signature_def"].value, signatures)
        return {
            name: {
                side: {key: self._spec(info) for key, info in sorted(getattr(definition, side).items())}
                for side in ("inputs", "outputs")
            }
            for name, definition in sorted(signatures.signature_def.items())
            if not name.startswith("__")
        }

    def status(self, timeout: float) -> list[dict[str, Any]]:
        request = self._messages["GetModelStatusRequest"]()
        request.model_spec.name = self._model
        response = self._ask(self._status, request, timeout)
        return [
            {
                "version": each.version,
                "state": _STATES.get(each.state, str(each.state)),
                "error_code": str(each.status.error_code) if each.status.error_code else "OK",
                "error_message": cut(each.status.error_message, 400),
            }
            for each in response.model_version_status
        ]

    def _outputs(self, response: Any) -> dict[str, Any]:
        with reading(self._address, _PROTOCOL):
            return {name: _array(tensor) for name, tensor in response.outputs.items()}

    def _request(self, signature: str, inputs: Mapping[str, Any]) -> Any:
        request = self._messages["PredictRequest"]()
        request.model_spec.name, request.model_spec.signature_name = self._model, signature
        for name, value in inputs.items():
            _fill(request.inputs[name], value if isinstance(value, np.ndarray) else self._typed(signature, name, value))
        return request

    def _typed(self, signature: str, name: str, value: Any) -> Any:
        """Lists as an array of the type that the signature says; unknown names are left for the server to refuse."""
        if self._known is None:
            self._known = self.metadata(10.0)
        spec = self._known.get(signature, {}).get("inputs", {}).get(name)
        numbers = {f"DT_{np.dtype(kind).name.upper()}": kind for kind in _DTYPES.values()}
        names = numbers | {"DT_FLOAT": np.float32, "DT_DOUBLE": np.float64}
        return np.array(value, names.get(spec["dtype"], np.object_)) if spec else np.array(value)

    def _spec(self, info: Any) -> dict[str, Any]:
        shape = info.tensor_shape
        return {
            "dtype": self._dtypes.get(info.dtype, str(info.dtype)),
            "shape": None if shape.unknown_rank else [dim.size for dim in shape.dim],
        }

    def _ask(self, method: Callable[..., Any], request: Any, timeout: float) -> Any:
        try:
            return method(request, timeout=timeout, metadata=self._call_metadata)
        except self._grpc.RpcError as error:
            raise self._failure(error) from None

    def _failure(self, error: Any) -> ServerError:
        code = error.code().name
        return ServerError(f"{self._address}: {code}: {cut(str(error.details()), 400)}", code)


def _fill(tensor: Any, value: Any) -> None:
    """Write a numpy array into a TensorProto."""
    for size in value.shape:
        tensor.tensor_shape.dim.add(size=size)
    if value.dtype.kind in "OSU":
        tensor.dtype = _STRING
        flat = value.ravel().tolist()
        tensor.string_val.extend(each if isinstance(each, bytes) else str(each).encode("utf-8") for each in flat)
    else:
        tensor.dtype = _NUMBERS[value.dtype]
        tensor.tensor_content = np.ascontiguousarray(value).tobytes()


def _array(tensor: Any) -> Any:
    """A TensorProto as an array; values left out at its end repeat the last one."""
    shape = [dim.size for dim in tensor.tensor_shape.dim]
    count = math.prod(shape)
    if any(size < 0 for size in shape) or len(shape) > 8 or count > MAX_ANSWER:
        raise ValueError("no shape of an answer")
    if tensor.dtype == _STRING:
        flat: Any = np.array([*tensor.string_val], np.object_)
    elif tensor.tensor_content:
        return np.frombuffer(tensor.tensor_content, _DTYPES[tensor.dtype]).reshape(shape)
    else:
        flat = np.array(getattr(tensor, _FIELDS[tensor.dtype]), _DTYPES[tensor.dtype])
    if 0 < len(flat) < count:
        flat = np.concatenate([flat, np.repeat(flat[-1:], count - len(flat))])
    return flat.reshape(shape)
