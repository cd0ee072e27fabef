"""Bodies that are long, read beside the event loop so that streams under way do not wait, and packed ones."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from serving.entrypoints.http_app import build_app
from serving.protocols.json_requests import number_array
from serving.protocols.open_inference import http as open_inference_http
from serving.protocols.open_inference.tensors import from_values
from serving.protocols.tf_serving import rest as tf_rest
from serving.server import request_bodies
from serving.server.settings import Settings
from tests.serving.double_engine import DoubleEngine, registry_of
from tests.serving.protocols.open_inference.double_server import all_routes


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    engine = DoubleEngine()
    registry, settings = registry_of(engine, tmp_path / "tiny"), Settings()
    with TestClient(build_app(registry, settings, all_routes(registry, settings))) as client:
        yield client
    engine.close()


def ids(count: int) -> dict[str, Any]:
    return {"name": "token_ids", "datatype": "INT32", "shape": [1, count], "data": [1] * count}


LENGTHS = {"name": "lengths", "datatype": "INT32", "shape": [1], "data": [1]}
DETOKENIZE = {"signature_name": "detokenize"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/detokenize", lambda n: {"tokens": [1] * n}),
        ("/v1/models/tiny:predict", lambda n: {**DETOKENIZE, "instances": [{"token_ids": [1] * n, "lengths": 1}]}),
        ("/v2/models/tiny/infer", lambda n: {"inputs": [ids(n), LENGTHS], "parameters": DETOKENIZE}),
        ("/v2/models/tiny/generate", lambda n: {"text_input": "a", "max_tokens": 1, "padding": [1] * n}),
    ],
)
def test_a_long_body_is_read_beside_the_loop(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str, body: Any
) -> None:
    seen: list[str] = []
    for module, name in (
        (request_bodies, "parse_body"),
        (open_inference_http, "parse_body"),
        (tf_rest, "parse_object"),
    ):
        real = getattr(module, name)

        def spy(*args: Any, real: Any = real) -> Any:
            seen.append(threading.current_thread().name)
            return real(*args)

        monkeypatch.setattr(module, name, spy)
    for count in (3, 40_000):
        answer = client.post(path, json=body(count))
        assert answer.status_code == 200, answer.text
    short, long = seen
    assert short != long and long.startswith("asyncio_")


@pytest.mark.parametrize("datatype", ["INT8", "UINT8", "INT32", "INT64", "UINT64", "FP16", "FP32", "FP64"])
def test_numbers_at_once_are_the_numbers_one_by_one(datatype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[Any] = [0, 1, -1, 127, 128, 255, 256, 2**31, -(2**31), 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**400]
    numbers += [0.1, 65504.0, 65520.0, 1e39, 1e-46, -0.0, float("nan"), float("inf"), True, "1", None]

    def results() -> list[Any]:
        made: list[Any] = []
        for values in ([], *([number] for number in numbers), numbers[:3], [1, 0.5]):
            try:
                array = from_values("x", datatype, [len(values)], values)
            except Exception as error:
                made.append(str(error))
            else:
                made.append((array.dtype, array.tobytes()))
        return made

    at_once = results()
    assert number_array([1, 2], np.int32) is not None
    monkeypatch.setattr("serving.protocols.open_inference.tensors.number_array", lambda values, kind: None)
    assert at_once == results()


def test_packed_bodies_are_unpacked_or_refused_by_name(client: TestClient) -> None:
    body = json.dumps({"prompt": "Ab", "max_tokens": 2, "temperature": 0}).encode()
    headers = {"Content-Type": "application/json"}
    plain = client.post("/v1/completions", content=body, headers=headers).json()["choices"]
    for encoding, packed in (("gzip", gzip.compress(body)), ("X-GZIP", gzip.compress(body)), ("identity", body)):
        answer = client.post("/v1/completions", content=packed, headers={**headers, "Content-Encoding": encoding})
        assert answer.status_code == 200 and answer.json()["choices"] == plain
    for path in ("/v1/completions", "/tokenize", "/detokenize"):
        answer = client.post(path, content=b"\x0b\x00", headers={**headers, "Content-Encoding": "br"})
        assert answer.status_code == 415 and "'br'" in answer.json()["error"]["message"]
        assert answer.headers["accept-encoding"] == "gzip, deflate"
    bomb = {"content": gzip.compress(bytes(10_000_000)), "headers": {**headers, "Content-Encoding": "gzip"}}
    assert client.post("/v1/completions", **bomb).status_code == 413
