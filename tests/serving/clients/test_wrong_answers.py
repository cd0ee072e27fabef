"""`gpt2-bundle client` by REST and gRPC before servers whose answers are malformed, endless or slow: one line each."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

from serving.cli import run
from serving.clients.rest_transport import RestTransport
from serving.clients.tf_serving import TFServingClient
from serving.errors import ServerError
from serving.protobuf.tf_serving import MESSAGES
from tests.serving.raw_server import read_request

SPECS = {"inputs": {"text": {"dtype": "DT_STRING", "tensor_shape": {"dim": [{"size": "-1"}]}}},
         "outputs": {"text": {"dtype": "DT_STRING", "tensor_shape": {"dim": [{"size": "-1"}]}},
                     "lengths": {"dtype": "DT_INT32", "tensor_shape": {"dim": [{"size": "-1"}]}}}}  # fmt: skip
GOOD = {"metadata": {"signature_def": {"signature_def": {"generate_text": SPECS}}}}
Answer = Callable[[socket.socket], None]


def json_answer(value: Any) -> bytes:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body


@contextlib.contextmanager
def rest(get: Answer, post: Answer | None = None) -> Iterator[str]:
    """A server that answers each GET by `get` and each POST by `post`."""
    listener = socket.create_server(("127.0.0.1", 0))

    def one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            head = read_request(connection)
            (post if post and head.startswith(b"POST") else get)(connection)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def says(value: Any) -> Answer:
    return lambda connection: connection.sendall(json_answer(value))


def one_line(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(["client", *arguments, "--model", "tiny", "--timeout", "2", "--retries", "0"]) == 1
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 700, error
    assert "internal error" not in error and "\x1b" not in error, error
    return error


WRONG: list[Any] = [
    {}, [], 3, b"\xff", b"[" * 100_000, {"metadata": 3}, {"metadata": {"signature_def": {"signature_def": [1]}}},
    {"metadata": {"signature_def": {"signature_def": {"a": {"inputs": {"x": {}}}}}}},
    {"metadata": {"signature_def": {"signature_def": {"a": {"inputs": {"x": {"dtype": "D", "tensor_shape": 3}}}}}}},
    {"model_version_status": 3}, {"model_version_status": [{}]},
    {"model_version_status": [{"version": "x", "state": 1}]},
    {"model_version_status": [{"version": {}, "state": "a" * 10_000}]},
    {"error": ["\x1b[2J" * 10_000]},
]  # fmt: skip


@pytest.mark.parametrize("value", WRONG, ids=range(len(WRONG)))
@pytest.mark.parametrize("command", ["status", "metadata"])
def test_rest_answers_to_questions(value: Any, command: str, capfd: pytest.CaptureFixture[str]) -> None:
    with rest(says(value)) as url:
        assert url in one_line(capfd, command, "--url", url)


OUTPUTS: list[Any] = [
    {}, {"outputs": 3}, {"outputs": []}, {"outputs": {"text": ["a"]}}, {"outputs": {"text": [1], "lengths": [1]}},
    {"outputs": {"text": ["a"], "lengths": ["b"]}}, {"outputs": {"text": ["a", "b"], "lengths": [1, 2]}},
    {"outputs": {"text": [["a"], "b"], "lengths": [1]}}, {"outputs": {"text": [{"b64": 3}], "lengths": [1]}},
    {"outputs": {"text": [{"c": "a"}], "lengths": [1]}}, {"predictions": [{"text": "a"}, {}]},
    {"predictions": [{"text": "a", "lengths": 1}, 3]}, {"outputs": {"text": None, "lengths": [None]}},
]  # fmt: skip


@pytest.mark.parametrize("value", OUTPUTS, ids=range(len(OUTPUTS)))
def test_rest_outputs(value: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with rest(says(GOOD), says(value)) as url:
        one_line(capfd, "predict", '{"text": ["a"]}', "--signature", "generate_text", "--url", url)


def test_a_head_or_a_body_that_trickles_ends_at_the_deadline(capfd: pytest.CaptureFixture[str]) -> None:
    def trickle(start: bytes) -> Answer:
        def send(connection: socket.socket) -> None:
            connection.sendall(start)
            while True:
                connection.sendall(b"X")
                time.sleep(0.1)

        return send

    for start in (b"", b"HTTP/1.1 200 OK\r\nX-Long: ", json_answer(b"")[:-5] + b"999\r\n\r\n"):
        with rest(trickle(start)) as url:
            began = time.monotonic()
            assert "deadline" in one_line(capfd, "status", "--url", url)
            assert time.monotonic() - began < 20, start


def test_an_endless_body_is_cut_off() -> None:
    def endless(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n")
        while True:
            connection.sendall(b" " * 1_000_000)

    with rest(endless) as url, pytest.raises(ServerError, match="too long"):
        TFServingClient(RestTransport(url, "tiny"), timeout=60, retries=0).status()


@contextlib.contextmanager
def grpc_server(answer: Callable[[str], bytes]) -> Iterator[str]:
    """A server whose answer to a method, by its name, is any bytes."""

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: Any) -> Any:
            name = details.method.rpartition("/")[2]
            return grpc.unary_unary_rpc_method_handler(lambda request, context: answer(name))

    server = grpc.server(futures.ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((Handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0)


def metadata() -> bytes:
    signatures = MESSAGES["SignatureDefMap"]()
    spec = signatures.signature_def["generate_text"]
    for side, name, dtype in (("inputs", "text", 7), ("outputs", "text", 7), ("outputs", "lengths", 3)):
        info = getattr(spec, side)[name]
        info.dtype = dtype
        info.tensor_shape.dim.add(size=-1)
    answer = MESSAGES["GetModelMetadataResponse"]()
    answer.metadata["signature_def"].value = signatures.SerializeToString()
    return bytes(answer.SerializeToString())


def outputs(**tensors: dict[str, Any]) -> bytes:
    answer = MESSAGES["PredictResponse"]()
    for name, fields in tensors.items():
        shape = fields.pop("shape")
        for field, value in fields.items():
            if isinstance(value, list):
                getattr(answer.outputs[name], field).extend(value)
            else:
                setattr(answer.outputs[name], field, value)
        for size in shape:
            answer.outputs[name].tensor_shape.dim.add(size=size)
    return bytes(answer.SerializeToString())


TEXT = {"dtype": 7, "string_val": [b"a"], "shape": [1]}
TENSORS: list[dict[str, Any]] = [
    {"dtype": 99, "shape": [1]},
    {"dtype": 3, "shape": [-1], "int_val": [1]},
    {"dtype": 3, "shape": [2**62], "int_val": [1]},
    {"dtype": 3, "shape": [2**31, 2**31], "int_val": [1]},
    {"dtype": 3, "shape": [1], "tensor_content": b"abc"},
    {"dtype": 3, "shape": [1], "int_val": [1, 2, 3]},
    {"dtype": 3, "shape": [2], "int_val": [1, 2]},
    {"dtype": 7, "shape": [1], "string_val": [b"x"]},
    {"dtype": 3, "shape": [1] * 200, "int_val": [1]},
]


@pytest.mark.parametrize("tensor", TENSORS, ids=range(len(TENSORS)))
def test_grpc_outputs(tensor: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    answer = outputs(text=dict(TEXT), lengths=dict(tensor))
    with grpc_server(lambda name: metadata() if name == "GetModelMetadata" else answer) as address:
        one_line(capfd, "predict", '{"text": ["a"]}', "--signature", "generate_text", "--grpc", address)


def test_grpc_answers_that_are_any_bytes(capfd: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(5)
    for command in ("metadata", "status"):
        with grpc_server(lambda name: draw.randbytes(40) + b"\xff") as address:
            one_line(capfd, command, "--grpc", address)
    wrong = MESSAGES["GetModelMetadataResponse"]()
    wrong.metadata["signature_def"].value = b"\xff" * 9
    with grpc_server(lambda name: wrong.SerializeToString()) as address:
        assert address in one_line(capfd, "metadata", "--grpc", address)
