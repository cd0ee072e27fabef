"""The description of the server says what the server does; bodies that fit nothing end in 4xx and never in 500."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from starlette.routing import Route
from starlette.testclient import TestClient

from serving.entrypoints.http_app import build_app
from serving.protocols.open_inference import schema as v2
from serving.protocols.openai import chat_schema, schema
from serving.protocols.openapi import examples
from serving.server.settings import Settings
from tests.closed_form import chat_files
from tests.serving.double_engine import DoubleEngine, registry_of
from tests.serving.protocols.open_inference.double_server import all_routes

SEEDS = 400
VALUES: list[Any] = [None, True, 0, -1, 1, 2**63, 1e308, "", "a", "\ud800", "é\0", [], [1], ["a"], [[1], [257]], {}]
VALUES += [{"a": 1}, {"5": 1e9}, {"b64": "!"}, [[[]]], [None], float("nan"), "x" * 3000]
FIELDS = [*schema.CompletionRequest.model_fields, "instances", "inputs", "signature_name", "tokens"]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    engine = DoubleEngine()
    extra = chat_files("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}")
    registry = registry_of(engine, tmp_path_factory.mktemp("openapi") / "tiny", extra=extra)
    settings = Settings()
    app = build_app(registry, settings, all_routes(registry, settings))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client
    registry.get("tiny").close()


def test_every_route_is_described_and_every_reference_resolves(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    described = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    routes = [route for route in client.app.routes if isinstance(route, Route)]  # type: ignore[attr-defined]
    there = {(method, route.path) for route in routes for method in (route.methods or set()) - {"HEAD"}}
    refused = {(method, path) for method, path in there if "{label}" in path or (method == "GET" and ":" in path)}
    refused |= {(method, path) for method, path in there if path.endswith((":classify", ":regress"))}
    assert described == there - refused - {("GET", path) for path in ("/", "/playground.css", "/playground.js")}
    names = [each["operationId"] for item in document["paths"].values() for each in item.values()]
    assert len(set(names)) == len(names)

    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                yield value["$ref"]
            for each in value.values():
                yield from references(each)
        elif isinstance(value, list):
            for each in value:
                yield from references(each)

    found = set(references(document))
    assert found and all(name.rpartition("/")[2] in document["components"]["schemas"] for name in found)


EXAMPLES = examples("Return the", "Hello")


@pytest.mark.parametrize("key", EXAMPLES)
def test_examples_and_their_answers_fit_the_schemas(client: TestClient, key: str) -> None:
    answers: dict[str, Any] = {
        "/v1/completions": schema.Completion,
        "/v1/chat/completions": chat_schema.ChatCompletion,
        "/tokenize": schema.Tokens,
        "/detokenize": schema.Text,
    }
    answers |= {"/v2/models/tiny/generate": v2.Generated, "/v2/models/tiny/infer": v2.InferAnswer}
    path = key.split()[1].replace("{model}", "tiny")
    answer = client.post(path, json=EXAMPLES[key])
    assert answer.status_code == 200
    answers[path].model_validate_json(answer.content, strict=True, extra="forbid")


@pytest.mark.parametrize("name", ["tiny", "none"])
@pytest.mark.parametrize("key", [None, "Bearer none"])
def test_both_kinds_of_clients_get_a_described_answer_about_a_model(
    client: TestClient, name: str, key: str | None
) -> None:
    """OpenAI's clients send a key and ask for JSON; TensorFlow Serving's do neither."""
    document = client.get("/openapi.json").json()
    headers = {"Accept": "*/*"} if key is None else {"Accept": "application/json", "Authorization": key}
    answer = client.get(f"/v1/models/{name}", headers=headers)
    found = answer.json()
    assert isinstance(found.get("error"), dict) or "id" in found or key is None
    assert isinstance(found.get("error"), str) or list(found) == ["model_version_status"] or key is not None
    described = document["paths"]["/v1/models/{model}"]["get"]["responses"][str(answer.status_code)]
    wanted = described["content"]["application/json"]["schema"]
    jsonschema.validate(found, {**wanted, "components": document["components"]})


def test_a_whole_number_may_have_a_point(client: TestClient) -> None:
    body = {"prompt": [65.0, 66], "max_tokens": 3.0, "temperature": 0, "n": 1.0, "stop_token_ids": [7.0]}
    plain = client.post("/v1/completions", json={"prompt": [65, 66], "max_tokens": 3, "temperature": 0}).json()
    assert client.post("/v1/completions", json=body).json()["choices"] == plain["choices"]
    assert client.post("/detokenize", json={"tokens": [65, 66.0]}).json() == {"prompt": "bc"}
    for tokens, words in (([65.5], "whole"), ([65.0, "66"], "whole"), ([65.0, True], "whole"), ([1e300], "from 0")):
        answer = client.post("/detokenize", json={"tokens": tokens})
        assert answer.status_code == 400 and words in answer.json()["error"]["message"], tokens
    answer = client.post(
        "/detokenize", content=b'{"tokens": [1.0, 1e999]}', headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400


@pytest.mark.parametrize("path", ["/v1/models/tiny:predict", "/v1/models/tiny/versions/1:predict"])
def test_predict_takes_post_alone(client: TestClient, path: str) -> None:
    for method in ("GET", "OPTIONS", "DELETE"):
        answer = client.request(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST") and "does not take" in answer.text


def mutant(source: random.Random) -> bytes:
    """A body with some fields of some kind, sometimes cut, sometimes with a byte changed."""
    body: Any = {name: source.choice(VALUES) for name in source.sample(FIELDS, source.randrange(6))}
    if source.random() < 0.1:
        body = source.choice(VALUES)
    data = bytearray(json.dumps(body).encode())
    if source.random() < 0.2:
        del data[source.randrange(len(data) + 1) :]
    elif data and source.random() < 0.2:
        data[source.randrange(len(data))] = source.randrange(256)
    return bytes(data)


def test_no_body_ends_in_an_internal_error(client: TestClient) -> None:
    source = random.Random(17)
    paths = ["/v1/completions", "/tokenize", "/detokenize", "/v1/models/tiny:predict"]
    seen: dict[int, int] = {}
    for _ in range(SEEDS):
        path, data = source.choice(paths), mutant(source)
        answer = client.post(path, content=data, headers={"Content-Type": "application/json"})
        seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
        assert answer.status_code in (200, 400, 404), (path, data, answer.text)
        assert answer.status_code == 200 or answer.json()["error"], (path, data)
    assert seen[400] > SEEDS / 4 and seen[200] > 5


def test_no_chat_ends_in_an_internal_error(client: TestClient) -> None:
    source = random.Random(18)
    seen: dict[int, int] = {}
    for _ in range(SEEDS // 2):
        part: dict[str, Any] = {"type": "text", "text": "a"}
        message: dict[str, Any] = {"role": "user", "content": [part]}
        body: dict[str, Any] = {"messages": [message], "max_tokens": 2}
        for table in source.choices([part, message, body], k=source.randrange(3)):
            names = {**(chat_schema.ChatRequest.model_fields if table is body else {}), **table, "name": 0}
            table[source.choice(list(names))] = source.choice(VALUES)
        path = source.choice(["/v1/chat/completions", "/tokenize"])
        data = json.dumps(body).encode()
        answer = client.post(path, content=data, headers={"Content-Type": "application/json"})
        seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
        assert answer.status_code in (200, 400, 404), (path, data, answer.text)
    assert seen[400] > 20 and seen[200] > 20, seen
