"""A stand-in that speaks TensorFlow Serving's REST and gRPC protocols over a SavedModel in a TensorFlow session.

It is not tensorflow_model_server: it loads as that does and answers in its messages, statuses and error format. It
merges requests of a signature that come within `gather` seconds, padding ragged inputs with zeros. `failures` holds
statuses that the next calls get instead of an answer; `delay` is seconds. `lost` holds what becomes of the next answers
once they are computed: a status instead, or seconds that they come late. `pad` is how often the first row of each call
is repeated behind the others, as the server's batching does. `cancelled` are the signatures of gRPC calls whose caller
was gone when they ended, for which TensorFlow Serving would have cancelled the work.
"""

from __future__ import annotations

import base64
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf import json_format
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from builder.keras_backend import tf
from builder.tf_export.session_servable import SessionServable

HTTP = {
    "INVALID_ARGUMENT": 400,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "ABORTED": 409,
    "CANCELLED": 499,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}


class Refused(Exception):
    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


class Merged:
    """Calls that wait to be run as one."""

    def __init__(self) -> None:
        self.parts: list[dict[str, Any]] = []
        self.outputs: dict[str, Any] = {}
        self.error: BaseException | None = None
        self.done = threading.Event()


def stack(parts: list[dict[str, Any]], name: str) -> Any:
    """The rows of all parts, filled up to the widest."""
    width = max(value.shape[-1] for value in (part[name] for part in parts))
    return np.concatenate(
        [np.pad(part[name], [(0, 0), (0, width - part[name].shape[1])]) if part[name].ndim == 2 else part[name]
         for part in parts]
    )  # fmt: skip


class Emulator(prediction_service_pb2_grpc.PredictionServiceServicer, model_service_pb2_grpc.ModelServiceServicer):
    def __init__(self, version: Path, name: str) -> None:
        self.servable, self.name = SessionServable(version), name
        # A dictionary, unlike protobuf's map, can lose a signature and get it back.
        self.servable.signatures = dict(self.servable.signatures)
        self.failures: list[str] = []
        self.gather, self.merged = 0.0, 0
        self._lock, self._waiting = threading.Lock(), dict[str, Merged]()
        self.lost: list[str | float] = []
        self.run_calls: list[str] = []
        self.cancelled: list[str] = []
        self.calls, self.delay, self.pad = 0, 0.0, 0
        self.url = self.address = ""

    def admit(self, name: str) -> None:
        self.calls += 1
        time.sleep(self.delay)
        if self.failures:
            raise Refused(self.failures.pop(0), "the batching queue is full")
        if name != self.name:
            raise Refused("NOT_FOUND", f"Could not find any versions of model {name}")

    def run(self, signature: str, inputs: dict[str, Any]) -> dict[str, Any]:
        if signature not in self.servable.signatures:
            raise Refused("INVALID_ARGUMENT", f'Serving signature key "{signature}" not found.')
        wanted = self.servable.signatures[signature].inputs
        if set(wanted) != set(inputs):
            raise Refused("INVALID_ARGUMENT", f"input keys must be {sorted(wanted)}")
        typed = {
            name: np.array(value, tf.as_dtype(wanted[name].dtype).as_numpy_dtype) for name, value in inputs.items()
        }
        try:
            outputs = self.merge(signature, typed) if self.gather else self.execute(signature, typed)
            loss = self.lost.pop(0) if self.lost else 0.0
            if isinstance(loss, str):
                raise Refused(loss, "the answer was lost")
            time.sleep(loss)
            return outputs
        except tf.errors.InvalidArgumentError as error:
            raise Refused("INVALID_ARGUMENT", error.message) from None

    def execute(self, signature: str, typed: dict[str, Any]) -> dict[str, Any]:
        rows = len(next(iter(typed.values())))
        if self.pad:
            typed = {name: np.concatenate([value, *[value[:1]] * self.pad]) for name, value in typed.items()}
        self.run_calls.append(signature)
        return {name: value[:rows] for name, value in self.servable.run(signature, **typed).items()}

    def merge(self, signature: str, typed: dict[str, Any]) -> dict[str, Any]:
        """Run a call together with those that come while it waits; the first of them runs all."""
        with self._lock:
            first = signature not in self._waiting
            batch = self._waiting.setdefault(signature, Merged())
            place = len(batch.parts)
            batch.parts.append(typed)
        if first:
            time.sleep(self.gather)
            with self._lock:
                del self._waiting[signature]
            self.merged += len(batch.parts) > 1
            try:
                batch.outputs = self.execute(signature, {name: stack(batch.parts, name) for name in typed})
            except BaseException as error:
                batch.error = error
            batch.done.set()
        batch.done.wait()
        if batch.error is not None:
            raise batch.error
        rows = [len(next(iter(part.values()))) for part in batch.parts]
        start = sum(rows[:place])
        return {name: value[start : start + rows[place]] for name, value in batch.outputs.items()}

    def definitions(self) -> Any:
        message = get_model_metadata_pb2.SignatureDefMap()
        for name, definition in self.servable.signatures.items():
            message.signature_def[name].CopyFrom(definition)
        return message

    # gRPC
    def answer(self, context: Any, name: str, work: Any) -> Any:
        try:
            self.admit(name)
            return work()
        except Refused as error:
            context.abort(getattr(grpc.StatusCode, error.code), str(error))

    def Predict(self, request: Any, context: Any) -> Any:
        def work() -> Any:
            inputs = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
            response = predict_pb2.PredictResponse()
            for name, value in self.run(request.model_spec.signature_name or "serving_default", inputs).items():
                response.outputs[name].CopyFrom(tf.make_tensor_proto(value))
            if not context.is_active():
                self.cancelled.append(request.model_spec.signature_name)
            return response

        return self.answer(context, request.model_spec.name, work)

    def GetModelMetadata(self, request: Any, context: Any) -> Any:
        def work() -> Any:
            response = get_model_metadata_pb2.GetModelMetadataResponse()
            response.metadata["signature_def"].Pack(self.definitions())
            return response

        return self.answer(context, request.model_spec.name, work)

    def GetModelStatus(self, request: Any, context: Any) -> Any:
        def work() -> Any:
            response = get_model_status_pb2.GetModelStatusResponse()
            response.model_version_status.add(version=1, state="AVAILABLE")
            return response

        return self.answer(context, request.model_spec.name, work)

    # REST
    def rest(self, path: str, body: Any) -> dict[str, Any]:
        name, _, rest = path.removeprefix("/v1/models/").partition("/")
        name, _, verb = name.partition(":")
        self.admit(name)
        if rest == "metadata":
            return {"metadata": {"signature_def": json_format.MessageToDict(
                self.definitions(), preserving_proto_field_name=True, always_print_fields_with_no_presence=True
            )}}  # fmt: skip
        if verb != "predict":
            state = {"error_code": "OK", "error_message": ""}
            return {"model_version_status": [{"version": "1", "state": "AVAILABLE", "status": state}]}
        rows = "instances" in body
        given = body["instances"] if rows else body["inputs"]
        columns = {key: [row[key] for row in given] for key in given[0]} if rows else given
        outputs = self.run(body.get("signature_name", "serving_default"), bare(columns))
        lists = {key: plain(value) for key, value in outputs.items()}
        if rows:
            made = [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
            return {"predictions": made if len(lists) > 1 else next(iter(lists.values()))}
        return {"outputs": lists if len(lists) > 1 else next(iter(lists.values()))}


def bare(value: Any) -> Any:
    if isinstance(value, dict):
        return base64.b64decode(value["b64"]) if set(value) == {"b64"} else {k: bare(v) for k, v in value.items()}
    if isinstance(value, list):
        return [bare(each) for each in value]
    return value.encode() if isinstance(value, str) else value


def plain(value: Any) -> Any:
    flat = value.tolist()
    return [each.decode() if isinstance(each, bytes) else each for each in flat]


@contextlib.contextmanager
def serving(version: Path, name: str, rest_port: int = 0, grpc_port: int = 0) -> Iterator[Emulator]:
    """The stand-in on two ports of this machine, free ones if they are 0."""
    emulator = Emulator(version, name)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                code, answer = 200, emulator.rest(self.path, json.loads(body) if body else None)
            except Refused as error:
                code, answer = HTTP[error.code], {"error": str(error)}
            data = json.dumps(answer).encode()
            with contextlib.suppress(OSError):
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        do_GET = do_POST

        def log_message(self, *arguments: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", rest_port), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    rpc = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_send_message_length", -1)])
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(emulator, rpc)
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(emulator, rpc)
    emulator.url = f"http://127.0.0.1:{http.server_port}"
    emulator.address = f"127.0.0.1:{rpc.add_insecure_port(f'127.0.0.1:{grpc_port}')}"
    rpc.start()
    try:
        yield emulator
    finally:
        http.shutdown()
        http.server_close()
        rpc.stop(0).wait()
