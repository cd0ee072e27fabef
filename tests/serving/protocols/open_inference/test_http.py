"""The Open Inference Protocol's bytes by HTTP, by hand: bodies, headers, events, refusals."""

from __future__ import annotations

import gzip
import json
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest

from serving.engine.api import DrainingError
from serving.protocols.open_inference import schema
from serving.protocols.open_inference.http import HEADER_LENGTH
from serving.server.registry import ServedModel, State
from serving.server.settings import Settings
from serving.server.state import Server
from tests.closed_form import byte_tokenizer, greedy
from tests.serving.double_engine import DoubleEngine, registry_of
from tests.serving.protocols.open_inference.double_server import serving_both

MODEL = "/v2/models/tiny"


@pytest.fixture(scope="module")
def engine() -> Iterator[DoubleEngine]:
    engine = DoubleEngine(slots=8, queue=256)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def server(engine: DoubleEngine, tmp_path_factory: pytest.TempPathFactory) -> Server:
    settings = Settings(max_body_bytes=20_000)
    return Server(registry_of(engine, tmp_path_factory.mktemp("v2") / "tiny"), settings)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with serving_both(server) as (url, _), httpx.Client(base_url=url) as client:
        yield client


def tensor(name: str, datatype: str, data: list[Any], shape: list[int] | None = None) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape or [len(data)], "data": data}


def expected(text: str, count: int) -> list[int]:
    tokens = greedy(byte_tokenizer().encode(text).ids, count, 257)
    return tokens[: tokens.index(256) + 1] if 256 in tokens else tokens


def events(body: str) -> list[dict[str, Any]]:
    assert body.endswith("\n\n")
    return [json.loads(event.removeprefix("data: ")) for event in body.removesuffix("\n\n").split("\n\n")]


def test_health_and_index(client: httpx.Client, server: Server) -> None:
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get(f"{MODEL}/ready").json() == {"name": "tiny", "ready": True}
    (model,) = server.registry.versions("tiny")
    model.state = State.LOADING
    try:
        for path in ("/v2/health/ready", f"{MODEL}/ready", f"{MODEL}/versions/1/ready"):
            answer = client.get(path)
            assert answer.status_code == 503 and answer.json()["ready"] is False
        assert client.post("/v2/repository/index").json() == [
            {"name": "tiny", "version": "1", "state": "LOADING", "reason": ""}
        ]
        assert client.post("/v2/repository/index", json={"ready": True}).json() == []
        answer = client.post(f"{MODEL}/generate", json={"text_input": "a"})
        assert answer.status_code == 503 and "not ready" in answer.json()["error"]
    finally:
        model.state = State.AVAILABLE
    assert client.get("/v2/models/nobody/ready").status_code == 404


def test_metadata_of_another_signature(client: httpx.Client) -> None:
    described = client.get(MODEL, params={"signature_name": "detokenize"}).json()
    assert described["inputs"][0] == {"name": "token_ids", "datatype": "INT32", "shape": [-1, -1]}
    assert described["outputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
    config = client.get(f"{MODEL}/config", params={"signature_name": "score"}).json()
    assert config["model_transaction_policy"] == {"decoupled": False}
    assert "tokenize" in config["parameters"]["signature_names"]["string_value"].split(",")


@pytest.mark.parametrize("where", ["top", "parameters"])
def test_generate(client: httpx.Client, where: str) -> None:
    options = {"max_tokens": 5, "temperature": 0}
    body = {"text_input": "ab", "id": "mine", **(options if where == "top" else {"parameters": options})}
    answer = client.post(f"{MODEL}/versions/1/generate", json=body)
    made = schema.Generated.model_validate_json(answer.content, strict=True, extra="forbid")
    tokens = expected("ab", 5)
    assert made.token_ids == tokens and made.lengths == len(tokens) and made.prompt_tokens == 2
    assert made.text_output == byte_tokenizer().decode(tokens) and made.finish_reason == "length"
    assert (made.id, made.model_name, made.model_version) == ("mine", "tiny", "1")
    several = client.post(f"{MODEL}/generate", json={"text_input": ["ab", "c"], **options}).json()
    assert several["text_output"] == [byte_tokenizer().decode(expected(text, 5)) for text in ("ab", "c")]
    assert "id" not in several


@pytest.mark.parametrize("content_type", [None, "application/x-www-form-urlencoded", "text/plain", "image/png"])
def test_a_bodys_content_type_is_not_looked_at(client: httpx.Client, content_type: str | None) -> None:
    """As in Triton, whose own examples send what curl sends by itself."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    options = {"text_input": "ab", "max_tokens": 5, "temperature": 0}
    infer = {"inputs": [tensor("text", "BYTES", ["ab"])], "parameters": {"signature_name": "tokenize"}}
    for path, body in (("generate", options), ("generate_stream", options), ("infer", infer)):
        answer = client.post(f"{MODEL}/{path}", content=json.dumps(body).encode(), headers=headers)
        assert answer.status_code == 200
        kind = "text/event-stream" if path.endswith("stream") else "application/json"
        assert answer.headers["content-type"].startswith(kind)


def test_stop_texts(client: httpx.Client) -> None:
    body = {"text_input": "ab", "max_tokens": 20, "temperature": 0}
    whole = client.post(f"{MODEL}/generate", json=body).json()["text_output"]
    made = client.post(f"{MODEL}/generate", json={**body, "stop": [whole[3]]}).json()
    assert made["text_output"] == whole[: whole.index(whole[3])] and made["finish_reason"] == "stop"
    stop = tensor("stop", "BYTES", [whole[3], "never"])
    asked = {
        "inputs": [tensor("text_input", "BYTES", ["ab"]), stop],
        "parameters": {"max_tokens": 20, "temperature": 0},
    }
    outputs = {each["name"]: each["data"] for each in client.post(f"{MODEL}/infer", json=asked).json()["outputs"]}
    assert outputs["text_output"] == [made["text_output"]]


def test_a_stream_is_the_whole_in_pieces(client: httpx.Client) -> None:
    body = {"text_input": "ab☃", "max_tokens": 30, "temperature": 0, "id": "mine"}
    whole = client.post(f"{MODEL}/generate", json=body).json()
    answer = client.post(f"{MODEL}/generate_stream", json={**body, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    pieces = events(answer.text)
    for piece in pieces:
        schema.Generated.model_validate(piece, strict=True, extra="forbid")
    assert "".join(piece["text_output"] for piece in pieces) == whole["text_output"]
    assert [token for piece in pieces for token in piece["token_ids"]] == whole["token_ids"]
    *before, last = [piece["finish_reason"] for piece in pieces]
    assert last == whole["finish_reason"] and set(before) <= {""}
    (only,) = events(client.post(f"{MODEL}/generate_stream", json={**body, "stream": False}).text)
    assert only == whole
    refused = client.post(f"{MODEL}/generate", json={**body, "stream": True})
    assert refused.status_code == 400 and "generate_stream" in refused.json()["error"]
    early = client.post(f"{MODEL}/generate_stream", json={**body, "max_tokens": 5000})
    assert early.status_code == 400 and "do not fit" in early.json()["error"]


def test_an_error_in_a_stream_is_an_event(client: httpx.Client, engine: DoubleEngine) -> None:
    engine.pace = 0.02
    try:
        body = {"text_input": "ab", "max_tokens": 900, "ignore_eos": True, "timeout": 300_000}
        *pieces, last = events(client.post(f"{MODEL}/generate_stream", json=body).text)
        assert pieces and last == {"error": "the request was not done within its time"}
        threading.Timer(0.2, setattr, (engine, "broken", "the disk is on fire")).start()
        body = {"text_input": "ab", "max_tokens": 900, "ignore_eos": True}
        *pieces, last = events(client.post(f"{MODEL}/generate_stream", json=body).text)
        assert pieces and last["error"].startswith("internal error")
    finally:
        engine.pace, engine.broken = 0.0, None


def test_who_leaves_a_stream_frees_the_slot(client: httpx.Client, engine: DoubleEngine) -> None:
    engine.pace = 0.02
    try:
        body = {"text_input": "ab", "max_tokens": 900, "ignore_eos": True}
        with client.stream("POST", f"{MODEL}/generate_stream", json=body) as answer:
            next(answer.iter_lines())
            assert engine.stats().active_slots == 1
        deadline = time.monotonic() + 5
        while engine.stats().active_slots and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.stats().active_slots == 0
    finally:
        engine.pace = 0.0


def with_bytes(head: dict[str, Any], *blobs: bytes) -> dict[str, Any]:
    text = json.dumps(head).encode()
    return {"content": b"".join([text, *blobs]), "headers": {HEADER_LENGTH: str(len(text))}}


def binary(name: str, datatype: str, shape: list[int], size: int) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}


def test_binary_tensors_both_ways(client: httpx.Client) -> None:
    ids, lengths = np.array([[65, 66], [67, 256]], "<i4").tobytes(), np.array([2, 1], "<i4").tobytes()
    inputs = [binary("token_ids", "INT32", [2, 2], 16), tensor("lengths", "INT32", [2, 1])]
    head = {"inputs": inputs, "parameters": {"signature_name": "detokenize", "binary_data_output": True}}
    answer = client.post(f"{MODEL}/infer", **with_bytes(head, ids))
    size = int(answer.headers[HEADER_LENGTH])
    (output,) = json.loads(answer.content[:size])["outputs"]
    wanted = [byte_tokenizer().decode([65, 66]).encode(), byte_tokenizer().decode([67]).encode()]
    blob = b"".join(struct.pack("<I", len(text)) + text for text in wanted)
    assert output == binary("text", "BYTES", [2], len(blob)) and answer.content[size:] == blob
    assert answer.headers["content-type"] == "application/octet-stream"
    # One output in JSON, one behind it.
    head["inputs"] = [binary("token_ids", "INT32", [2, 2], 16), binary("lengths", "INT32", [2], 8)]
    head["parameters"] = {"signature_name": "score", "binary_data_output": True}
    head["outputs"] = [{"name": "total", "parameters": {"binary_data": False}}, {"name": "log_probs"}]
    answer = client.post(f"{MODEL}/infer", **with_bytes(head, ids, lengths))
    size = int(answer.headers[HEADER_LENGTH])
    total, log_probs = json.loads(answer.content[:size])["outputs"]
    assert (total["name"], log_probs["parameters"]) == ("total", {"binary_data_size": 16})
    values = np.frombuffer(answer.content[size:], "<f4").reshape(2, 2)
    assert np.allclose(values.sum(axis=1), total["data"]) and len(answer.content) == size + 16


def test_packed_bodies(client: httpx.Client) -> None:
    plain = json.dumps({"text_input": "ab", "max_tokens": 2}).encode()
    for name, packed in (("gzip", gzip.compress(plain)), ("deflate", zlib.compress(plain))):
        answer = client.post(f"{MODEL}/generate", content=packed, headers={"Content-Encoding": name})
        assert answer.status_code == 200, answer.text
    bomb = gzip.compress(bytes(10_000_000))
    for name, packed, status, words in (
        ("br", plain, 415, "gzip or deflate"),
        ("gzip", plain, 400, "cannot be unpacked"),
        ("gzip", gzip.compress(plain)[:-4], 400, "too early"),
        ("gzip", gzip.compress(plain) + b"!", 400, "continues after its end"),
        ("gzip", b"", 400, "too early"),
        ("gzip", bomb, 413, "when it is unpacked"),
    ):
        answer = client.post(f"{MODEL}/generate", content=packed, headers={"Content-Encoding": name})
        assert answer.status_code == status and words in answer.json()["error"]


TEXT_INPUT = tensor("text_input", "BYTES", ["a"])
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"content": b"{"}, "not JSON"),
    ({"content": b"[" * 10_000}, "not JSON"),
    ({"json": {}}, "inputs: field required"),
    ({"json": {"inputs": [TEXT_INPUT, TEXT_INPUT]}}, "there twice"),
    ({"json": {"inputs": [TEXT_INPUT | {"datatype": "FLOAT"}]}}, "datatype 'FLOAT'"),
    ({"json": {"inputs": [TEXT_INPUT | {"shape": [2]}]}}, "1 values"),
    ({"json": {"inputs": [TEXT_INPUT | {"shape": [-1]}]}}, "no shape"),
    ({"json": {"inputs": [TEXT_INPUT | {"shape": [0, 2**62, 2**62], "data": []}]}}, "no shape"),
    ({"json": {"inputs": [TEXT_INPUT | {"data": [["a"], "b"]}]}}, "side by side"),
    ({"json": {"inputs": [TEXT_INPUT | {"data": [1]}]}}, "must hold text"),
    ({"json": {"inputs": [TEXT_INPUT | {"data": None}]}}, "neither data nor"),
    ({"json": {"inputs": [TEXT_INPUT, tensor("top_k", "INT32", [2**31])]}}, "integers of INT32"),
    ({"json": {"inputs": [TEXT_INPUT, tensor("top_k", "INT32", [1.5])]}}, "integers of INT32"),
    ({"json": {"inputs": [TEXT_INPUT, tensor("ignore_eos", "BOOL", [1])]}}, "true and false"),
    ({"json": {"inputs": [TEXT_INPUT, tensor("temperature", "FP32", [10**400])]}}, "temperature: "),
    ({"json": {"inputs": [TEXT_INPUT | {"parameters": {"shared_memory_region": "x"}}]}}, "shared_memory_region"),
    ({"json": {"inputs": [TEXT_INPUT], "outputs": [{"name": "logits"}]}}, "no output 'logits'"),
    (
        {"json": {"inputs": [TEXT_INPUT], "outputs": [{"name": "text_output", "parameters": {"classification": 3}}]}},
        "classification",
    ),
    ({"json": {"inputs": [TEXT_INPUT], "parameters": {"timeout": -1}}}, "microseconds"),
    ({"json": {"inputs": [], "parameters": {"text_input": "a"}}}, "text_input is missing"),
    ({"content": b"{}", "headers": {HEADER_LENGTH: "3"}}, "the body has 2 bytes"),
    ({"content": b"{}", "headers": {HEADER_LENGTH: "-1"}}, "the body has 2 bytes"),
    (with_bytes({"inputs": [TEXT_INPUT]}, b"x"), "1 bytes after"),
    (with_bytes({"inputs": [binary("text_input", "BYTES", [1], 9)]}, b"x"), "there are 1 after"),
    (with_bytes({"inputs": [binary("text_input", "BYTES", [1], -1)]}, b"x"), "there are 1 after"),
    (with_bytes({"inputs": [binary("text_input", "BYTES", [1], 5)]}, b"\2\0\0\0x"), "inside an element"),
    (with_bytes({"inputs": [binary("text_input", "BYTES", [1], 3)]}, b"\0\0\0"), "inside an element"),
    (with_bytes({"inputs": [binary("text_input", "BYTES", [2], 5)]}, b"\1\0\0\0x"), "1 elements"),
    (with_bytes({"inputs": [binary("text_input", "BYTES", [1], 5) | {"data": ["a"]}]}, b"\1\0\0\0x"), "both data"),
    (with_bytes({"inputs": [TEXT_INPUT, binary("top_k", "INT32", [1], 3)]}, b"xyz"), "need 4"),
]


@pytest.mark.parametrize(("asked", "words"), WRONG)
def test_what_is_wrong_is_said(client: httpx.Client, asked: dict[str, Any], words: str) -> None:
    answer = client.post(f"{MODEL}/infer", **asked)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"].lower() or words in answer.json()["error"], answer.text


def test_generate_has_one_signature(client: httpx.Client) -> None:
    answer = client.post(f"{MODEL}/generate", json={"text_input": "a", "signature_name": "score"})
    assert answer.status_code == 400 and "ask infer" in answer.json()["error"]


def test_a_request_that_meets_a_swap_goes_to_the_new_version(tmp_path: Path, engine: DoubleEngine) -> None:
    class Leaving(DoubleEngine):
        """Refuses as an engine does whose successor is there by now."""

        def submit(self, request: Any, listener: Any) -> Any:
            (old,) = registry.versions("tiny")[-1:]
            registry.add(ServedModel("tiny", 2, old.bundle, engine, 0, State.AVAILABLE))
            raise DrainingError("the engine takes nothing new")

    leaving = Leaving()
    registry = registry_of(leaving, tmp_path / "tiny")
    parameters = {"signature_name": "generate_text", "max_new_tokens": 2, "temperature": 0, "top_k": 0, "top_p": 1}
    asked = {"inputs": [tensor("text", "BYTES", ["a"])], "parameters": {**parameters, "seed": 0}}
    with serving_both(Server(registry)) as (url, _), httpx.Client(base_url=url) as client:
        for path, body in (
            ("generate", {"text_input": "a"}),
            ("generate_stream", {"text_input": "a"}),
            ("infer", asked),
        ):
            registry.remove("tiny", 2)
            answer = client.post(f"{MODEL}/{path}", json=body)
            assert answer.status_code == 200, answer.text
            found = events(answer.text)[-1] if path == "generate_stream" else answer.json()
            assert found["model_version"] == "2"
        answer = client.post(f"{MODEL}/versions/1/generate", json={"text_input": "a"})
        assert answer.status_code == 503
    leaving.close()


def test_what_triton_clients_send_is_taken(client: httpx.Client) -> None:
    """[n, 1] for [n], and INT64 for INT32."""

    def ask(*inputs: dict[str, Any]) -> Any:
        outputs = client.post(f"{MODEL}/infer", json={"inputs": list(inputs)}).json()["outputs"]
        return {output["name"]: output["data"] for output in outputs}

    usual = ask(tensor("text_input", "BYTES", ["A", "B"]), tensor("max_tokens", "INT32", [3, 4]))
    wide = ask(tensor("text_input", "BYTES", ["A", "B"], [2, 1]), tensor("max_tokens", "INT64", [3, 4], [2, 1]))
    assert usual["text_output"] == wide["text_output"] and usual["lengths"] == wide["lengths"]
