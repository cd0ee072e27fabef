"""The client against a stand-in of the server's protocols, and against the server itself where it is installed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from serving.cli import run
from serving.clients import outliving_calls
from serving.clients.grpc_transport import GrpcTransport
from serving.clients.rest_transport import RestTransport
from serving.clients.tf_serving import TFServingClient
from serving.errors import InputError, ServerError
from serving.sampling import SamplingParams
from tests.oracles.fixtures import keras_model
from tests.serving.raw_server import read_request
from tests.serving.tf_serving_emulator import Emulator, serving
from tests.tiny_build import Fails

KINDS = ["row", "column", "grpc"]
GREEDY = SamplingParams(max_new_tokens=5, temperature=0.0)
SNOWMAN = "naïve ☃ 🙂"


@pytest.fixture(scope="module")
def server(real_bundle: Path) -> Iterator[Emulator]:
    with serving(real_bundle / "savedmodel/1", "bytes") as emulator:
        yield emulator


@pytest.fixture(autouse=True)
def calm(server: Emulator) -> None:
    server.failures, server.calls, server.delay = [], 0, 0.0


def connect(server: Emulator, kind: str, model: str = "bytes", **options: Any) -> TFServingClient:
    transport: Any = GrpcTransport(server.address, model) if kind == "grpc" else None
    return TFServingClient(transport or RestTransport(server.url, model, kind), **options)  # type: ignore[arg-type]


def prompt(rows: int = 2) -> dict[str, Any]:
    return {"token_ids": np.tile(np.array([[7, 8, 9]], np.int32), (rows, 1)), "lengths": np.full(rows, 3, np.int32)}


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_those_of_the_session(server: Emulator, kind: str) -> None:
    got = connect(server, kind).predict(prompt(), "score")
    wanted = server.servable.run("score", **prompt())
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        assert np.allclose(got[name], value, atol=1e-6) and got[name].shape == value.shape


@pytest.mark.parametrize("kind", KINDS)
def test_text(server: Emulator, kind: str) -> None:
    (made,) = connect(server, kind).generate([SNOWMAN], GREEDY)
    assert [made.text] == server.servable.generate_text([SNOWMAN], max_new_tokens=5)
    assert 1 <= made.tokens <= 5 and made.finish_reason in ("stop", "length")
    # A single output, which REST sends without its name, and text back as it went.
    tokens = connect(server, kind).predict({"text": np.array([SNOWMAN.encode()], np.object_)}, "tokenize")
    back = connect(server, kind).predict(tokens, "detokenize")["text"][0]
    assert (back.decode() if isinstance(back, bytes) else back) == SNOWMAN


@pytest.mark.parametrize("kind", KINDS)
def test_without_generate_text_the_client_tokenizes(
    server: Emulator, real_bundle: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, tokenizer = connect(server, kind), Tokenizer.from_file(str(real_bundle / "tokenizer.json"))
    wanted = client.generate(["one", SNOWMAN], GREEDY)
    monkeypatch.delitem(server.servable.signatures, "generate_text")
    assert client.generate(["one", SNOWMAN], GREEDY, tokenizer) == wanted
    with pytest.raises(ServerError, match="generate_text"):
        client.generate(["one"], GREEDY)


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_and_status(server: Emulator, kind: str) -> None:
    client = connect(server, kind)
    signatures = client.metadata()
    assert set(signatures) == {name for name in server.servable.signatures if not name.startswith("__")}
    assert signatures["score"]["inputs"] == {
        "token_ids": {"dtype": "DT_INT32", "shape": [-1, -1]},
        "lengths": {"dtype": "DT_INT32", "shape": [-1]},
    }
    assert client.status() == [{"version": 1, "state": "AVAILABLE", "error_code": "OK", "error_message": ""}]


@pytest.mark.parametrize("kind", KINDS)
def test_a_busy_server_is_asked_again(server: Emulator, kind: str) -> None:
    server.failures = ["UNAVAILABLE", "RESOURCE_EXHAUSTED"]
    client = connect(server, kind)
    # The signatures are asked for once.
    assert client.predict(prompt(), "score")["total"].shape == (2,)
    assert server.calls == 4

    client = connect(server, kind, retries=1)
    client.predict(prompt(), "score")
    server.calls, server.failures = 0, ["UNAVAILABLE"] * 9
    with pytest.raises(ServerError, match="the batching queue is full") as caught:
        client.predict(prompt(), "score")
    assert caught.value.code == "UNAVAILABLE" and server.calls == 2

    server.calls, server.failures = 0, ["UNAVAILABLE"]
    with pytest.raises(ServerError):
        client.predict(prompt(), "score", idempotent=False)
    assert server.calls == 1


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_dropped_with_others_is_asked_again(server: Emulator, kind: str) -> None:
    client = connect(server, kind)
    client.metadata()
    server.failures = ["ABORTED", "CANCELLED"]
    assert client.predict(prompt(), "score")["total"].shape == (2,) and not server.failures
    server.failures = ["CANCELLED", "ABORTED"]
    assert client.repeat("score", prompt())["total"].shape == (2,) and not server.failures


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_server_would_answer_with_a_fault_is_not_sent(server: Emulator, kind: str, fails: Fails) -> None:
    client = connect(server, kind)
    client.metadata()
    server.run_calls.clear()
    for inputs, words in (
        ({"text": np.array([], np.object_)}, "text has no rows"),
        ({"text": []}, "text has no rows"),
        ({"text": b"a"}, "text must have 1 axes, the first for rows, and has 0"),
        ({"text": [["a"]]}, "text must have 1 axes, the first for rows, and has 2"),
    ):
        with pytest.raises(InputError, match=words):
            client.predict(inputs, "tokenize")
    for inputs, words in (
        ({"token_ids": [7, 8], "lengths": [1, 1]}, "token_ids must have 2 axes, the first for rows, and has 1"),
        ({"token_ids": [[7, 8], [9]], "lengths": [2, 1]}, "token_ids has rows of unequal lengths"),
        ({"token_ids": [[7, 8]], "lengths": [1, 1]}, "unequal rows: token_ids 1, lengths 2"),
    ):
        with pytest.raises(InputError, match=words):
            client.predict(inputs, "score")
    assert client.generate([], GREEDY) == [] == list(client.stream([], GREEDY))
    assert not server.run_calls
    place = ["--grpc", server.address] if kind == "grpc" else ["--url", server.url]
    command = ["client", "predict", json.dumps({"text": []}), "--signature", "tokenize", "--model", "bytes", *place]
    fails(command, 2, "text has no rows")


@pytest.mark.parametrize("kind", ["column", "grpc"])
def test_the_end_token_is_the_models(server: Emulator, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = keras_model("bytes").geometry.eos_token_id
    assert connect(server, kind).end_token() == wanted
    monkeypatch.delitem(server.servable.signatures, "tokenize")
    assert connect(server, kind).end_token() == wanted
    assert connect(server, kind, eos_token_id=3).end_token() == 3


def test_a_call_over_slots_outlives_its_caller(server: Emulator) -> None:
    server.cancelled.clear()
    server.delay = 0.5
    began = time.monotonic()
    with pytest.raises(ServerError, match="the call continues") as caught:
        connect(server, "grpc", timeout=0.1, retries=0).repeat("score", prompt())
    assert caught.value.code == "DEADLINE_EXCEEDED" and time.monotonic() - began < 0.4
    for thread in list(outliving_calls._under_way):
        thread.join()
    assert server.calls == 1 and not server.cancelled
    # What may be cancelled is: the stand-in sees it.
    with pytest.raises(ServerError):
        connect(server, "grpc", timeout=0.1, retries=0, eos_token_id=0).attempt(
            lambda left: GrpcTransport(server.address, "bytes").predict("score", prompt(), left)
        )
    deadline = time.monotonic() + 5
    while not server.cancelled and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.cancelled == ["score"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_wrong_is_said_once_in_the_servers_words(server: Emulator, kind: str) -> None:
    wrong = prompt() | {"lengths": np.array([0, 3], np.int32)}
    with pytest.raises(ServerError, match="a prompt may not be empty") as caught:
        connect(server, kind).predict(wrong, "score")
    assert caught.value.code == "INVALID_ARGUMENT" and server.calls == 2
    with pytest.raises(ServerError, match="model nobody") as caught:
        connect(server, kind, "nobody").status()
    assert caught.value.code == "NOT_FOUND"


@pytest.mark.parametrize("kind", KINDS)
def test_deadlines(server: Emulator, kind: str) -> None:
    server.delay = 0.6
    with pytest.raises(ServerError) as caught:
        connect(server, kind, timeout=0.2).predict(prompt(), "score")
    assert caught.value.code == "DEADLINE_EXCEEDED" and server.calls == 1
    server.delay = 0.0
    server.failures = ["UNAVAILABLE"] * 99
    began = time.monotonic()
    with pytest.raises(ServerError):
        connect(server, kind, timeout=0.5, retries=99).status()
    assert server.calls > 1 and time.monotonic() - began < 5


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_over_grpcs_default_of_4_mib(server: Emulator, kind: str) -> None:
    rows = 300
    got = connect(server, kind).predict(prompt(rows) | {"capacity": np.full(rows, 48, np.int32)}, "prefill")
    assert sum(value.size * 4 for value in got.values()) > 4 * 2**20
    assert got["logits"].shape[0] == rows


def _answer(listening: socket.socket, answer: bytes) -> None:
    """Read one request and send `answer` for it, whatever it is."""
    connection, _ = listening.accept()
    with connection:
        read_request(connection)
        connection.sendall(answer)


def test_a_server_that_is_not_there(fails: Fails) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = ["client", "status", "--model", "bytes", "--retries", "0"]
    fails([*command, "--url", f"http://{address}"], 1, "is it running?")
    fails([*command, "--grpc", address, "--timeout", "5"], 1, address)
    for answer, words in (
        (b"\0\0\x1b[31m\xff\r\n\r\n", "the answer is not HTTP"),
        (
            b'HTTP/1.0 404 no\r\n\r\n{"error": {"message": "no model \\u001b[31m", "code": 1}}',
            "NOT_FOUND: no model \\x1b[31m",
        ),
    ):
        with socket.create_server(("127.0.0.1", 0)) as listening:
            place = f"http://127.0.0.1:{listening.getsockname()[1]}"
            threading.Thread(target=_answer, args=(listening, answer)).start()
            fails([*command, "--url", place], 1, words)
    fails(command, 2, "name one server")
    fails([*command, "--url", "localhost:8501"], 2, "not an address of a server")
    fails(["client", "predict", "{", "--url", "http://x", "--model", "m"], 2, "not JSON")


@pytest.mark.parametrize("kind", ["url", "grpc"])
def test_the_command(server: Emulator, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--{kind}", server.url if kind == "url" else server.address, "--model", "bytes"]

    def ask(*arguments: str) -> str:
        assert run(["client", *arguments, *options]) == 0
        return capsys.readouterr().out.splitlines()[-1]

    assert ask("status") == "version 1: AVAILABLE"
    assert "serving_default" in json.loads(ask("metadata", "--json"))["signatures"]
    wanted = server.servable.generate_text([SNOWMAN], max_new_tokens=5)
    made = json.loads(ask("generate", SNOWMAN, "--max-new-tokens", "5", "--temperature", "0", "--json"))
    assert [made["text"]] == wanted
    outputs = json.loads(ask("predict", json.dumps({"text": ["ab"]}), "--signature", "tokenize", "--json"))["outputs"]
    assert outputs["lengths"] == [2]


@pytest.mark.slow
def test_the_real_server(real_bundle: Path, tmp_path: Path) -> None:
    binary = os.environ.get("TENSORFLOW_MODEL_SERVER", "tensorflow_model_server")
    if shutil.which(binary) is None:
        pytest.skip("no tensorflow_model_server on PATH or in TENSORFLOW_MODEL_SERVER: the real server was not run")
    folder = tmp_path / "deployed"
    assert run(["deploy", str(real_bundle), "--target", "tfserving", "--output", str(folder)]) == 0
    process = subprocess.Popen([folder / "run.sh"])
    try:
        client = TFServingClient(RestTransport("http://127.0.0.1:8501", "bytes"), timeout=60, retries=60)
        assert client.status()[0]["state"] in ("AVAILABLE", "LOADING", "START")
        (by_rest,) = client.generate([SNOWMAN], GREEDY)
        (by_grpc,) = TFServingClient(GrpcTransport("127.0.0.1:8500", "bytes")).generate([SNOWMAN], GREEDY)
        assert by_rest == by_grpc
    finally:
        process.terminate()
        process.wait()
