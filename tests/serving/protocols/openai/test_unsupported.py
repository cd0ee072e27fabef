"""Nothing is swallowed: what would change an answer and is not done here is refused by name, by every protocol."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from serving.engine.api import GenerationRequest
from serving.entrypoints.http_app import build_app
from serving.protocols.openai.unsupported import UNSUPPORTED
from serving.protocols.tf_serving.signatures import _seed
from serving.server import request_bodies
from serving.server.settings import Settings
from tests.serving.double_engine import DoubleEngine, registry_of
from tests.serving.protocols.open_inference.double_server import all_routes

BODY = {"prompt": "A", "temperature": 0, "max_tokens": 4}


@pytest.fixture
def engine() -> Iterator[DoubleEngine]:
    engine = DoubleEngine()
    yield engine
    engine.close()


@pytest.fixture
def client(engine: DoubleEngine, tmp_path: Path) -> TestClient:
    registry, settings = registry_of(engine, tmp_path / "tiny"), Settings()
    return TestClient(build_app(registry, settings, all_routes(registry, settings)))


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_changes_an_answer_is_refused_by_name(client: TestClient, name: str) -> None:
    answer = client.post("/v1/completions", json={**BODY, name: 7})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name and name in answer.json()["error"]["message"]
    for nothing in (None, *UNSUPPORTED[name]):
        assert client.post("/v1/completions", json={**BODY, name: nothing}).status_code == 200, nothing


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("generate", {"text_input": "A", "use_beam_search": True}),
        ("generate", {"text_input": "A", "parameters": {"use_beam_search": True}}),
        (
            "infer",
            {
                "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["A"]}],
                "parameters": {"use_beam_search": True},
            },
        ),
    ],
)
def test_the_open_inference_protocol_refuses_them_too(client: TestClient, path: str, body: dict[str, Any]) -> None:
    answer = client.post(f"/v2/models/tiny/{path}", json=body)
    assert answer.status_code == 400 and "use_beam_search" in answer.json()["error"]


def test_an_unknown_field_is_logged_once(
    client: TestClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_bodies, "_ignored", set())
    with caplog.at_level(logging.INFO, "gpt2_bundle.server"):
        for _ in range(3):
            assert client.post("/v1/completions", json={**BODY, "metadata_x": 1}).status_code == 200
    assert [record.getMessage() for record in caplog.records if "metadata_x" in record.getMessage()] == [
        "the field 'metadata_x' of a CompletionRequest is not known here, and ignored"
    ]


def test_max_completion_tokens_is_max_tokens(client: TestClient) -> None:
    def ask(**fields: Any) -> Any:
        return client.post("/v1/completions", json={"prompt": "A", "temperature": 0, **fields})

    assert ask(max_completion_tokens=3).json()["usage"]["completion_tokens"] == 3
    assert ask(max_completion_tokens=3, max_tokens=3).status_code == 200
    answer = ask(max_completion_tokens=3, max_tokens=4)
    assert answer.status_code == 400 and "max_completion_tokens" in answer.json()["error"]["message"]


def test_seed_minus_one_is_no_seed_on_every_path(client: TestClient, engine: DoubleEngine) -> None:
    seen: list[int] = []
    real = engine.submit

    def submit(request: GenerationRequest, listener: Any) -> Any:
        seen.append(request.params.seed)
        return real(request, listener)

    engine.submit = submit  # type: ignore[method-assign]
    tensors = [
        {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["A"]},
        {"name": "seed", "datatype": "INT64", "shape": [1], "data": [-1]},
    ]
    row = {"text": "A", "max_new_tokens": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": -1}
    for _ in range(2):
        for path, body in (
            ("/v1/completions", {"prompt": "A", "max_tokens": 1, "seed": -1}),
            ("/v2/models/tiny/generate", {"text_input": "A", "parameters": {"seed": -1, "max_tokens": 1}}),
            ("/v2/models/tiny/infer", {"inputs": tensors, "parameters": {"max_tokens": 1}}),
            ("/v1/models/tiny:predict", {"signature_name": "generate_text", "instances": [row]}),
        ):
            answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
            assert answer.status_code == 200, answer.text
    assert len(set(seen)) == len(seen) == 8
    assert _seed(int(np.int64(7))) == 7
