"""Structured output over HTTP: every field that asks for it, what is refused, and streams that follow too."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from starlette.testclient import TestClient

from serving.bundle import open_bundle
from serving.engine.engine import SlotEngine
from serving.entrypoints.http_app import build_app
from serving.errors import InputError, RuntimeMissingError
from serving.sampling import grammars
from serving.sampling.constraints import StructuredOutput
from serving.server import grammar_pool
from serving.server.errors import FieldError
from serving.server.registry import ModelRegistry, ServedModel, State
from serving.server.settings import Settings
from tests.closed_form import write_bundle
from tests.serving.double_engine import DoubleEngine
from tests.serving.guided_model import open_engine
from tests.serving.protocols.open_inference.double_server import all_routes

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"type": "string", "maxLength": 5}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def client_of(engine: Any, folder: Path) -> TestClient:
    write_bundle(folder)
    registry, settings = ModelRegistry(), Settings()
    registry.add(ServedModel("tiny", 1, open_bundle(folder), engine, 0, State.AVAILABLE))
    return TestClient(build_app(registry, settings, all_routes(registry, settings)))


@pytest.fixture(scope="module")
def engine() -> Iterator[SlotEngine]:
    made = open_engine()
    yield made
    made.close()


@pytest.fixture
def client(engine: SlotEngine, tmp_path: Path) -> TestClient:
    return client_of(engine, tmp_path / "tiny")


def ask(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/completions", json={"prompt": "hello", "max_tokens": 300, "seed": 1, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA), "disable_any_whitespace": True}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}},
    ],
)
def test_a_schema_by_each_of_its_fields(client: TestClient, fields: dict[str, Any]) -> None:
    answer = ask(client, **fields, n=3)
    assert answer.status_code == 200, answer.text
    for choice in answer.json()["choices"]:
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
        jsonschema.validate(json.loads(choice["text"]), SCHEMA)
        assert "disable_any_whitespace" not in str(fields) or not re.search(r'^\{\s|[,:]\s*"?\s', choice["text"][:4])


@pytest.mark.parametrize(
    ("kind", "value", "pattern"),
    [
        ("regex", "[0-9]{3}x", "[0-9]{3}x"),
        ("choice", ["yes", "no"], "yes|no"),
        ("grammar", 'start: "a" /[0-9]/', "a[0-9]"),
    ],
)
def test_the_other_kinds(client: TestClient, kind: str, value: Any, pattern: str) -> None:
    for fields in ({f"guided_{kind}": value}, {"structured_outputs": {kind: value}}):
        answer = ask(client, **fields, prompt=["one", "two"], n=2)
        assert [choice["finish_reason"] for choice in answer.json()["choices"]] == ["stop"] * 4, answer.text
        assert all(re.fullmatch(pattern, choice["text"]) for choice in answer.json()["choices"])


def test_any_object_and_what_asks_for_nothing(client: TestClient) -> None:
    for fields in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        assert ask(client, **fields).json()["choices"][0]["text"].startswith("{")
    plain = ask(client, max_tokens=9).json()["choices"][0]["text"]
    for fields in (
        {"response_format": {"type": "text"}},
        {"response_format": None, "guided_json": None, "structured_outputs": None},
        {"guided_decoding_backend": "auto"},
    ):
        assert ask(client, max_tokens=9, **fields).json()["choices"][0]["text"] == plain


def test_a_stream_and_its_log_probabilities(client: TestClient) -> None:
    body = {"prompt": "x", "guided_regex": "[ab]{6}", "stream": True, "logprobs": 3, "seed": 5}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: {")]
    chunks = [json.loads(line)["choices"][0] for line in lines]
    assert re.fullmatch("[ab]{6}", "".join(chunk["text"] for chunk in chunks))
    assert chunks[-1]["finish_reason"] == "stop"
    tops = [top for chunk in chunks for top in chunk["logprobs"]["top_logprobs"]]
    assert tops and all(set("".join(top)) <= set("ab") for top in tops)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex", "guided_json and guided_regex"),
        ({"response_format": {"type": "json_object"}, "guided_choice": ["a"]}, "guided_choice", "response_format and"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["a"]}},
            "structured_outputs.choice",
            "structured_outputs.regex",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "says nothing"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs", "structural_tag"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs", "regexp"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": "x"}}, "structured_outputs", "whitespace_pattern"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema.schema"),
        ({"response_format": {"type": "yaml"}}, "response_format", "json_object"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format", "schema"),
        ({"guided_choice": []}, "guided_choice", "0 choices"),
        ({"guided_choice": "a"}, "guided_choice", "list"),
        ({"guided_regex": 7}, "guided_regex", "string"),
        ({"guided_regex": "(["}, "guided_regex", "regex parse error"),
        ({"guided_json": '{"type": "banana"}'}, "guided_json", "banana"),
        ({"guided_json": "[" * 70 + "]" * 70}, "guided_json", "brackets"),
        ({"guided_grammar": "a" * 40000}, "guided_grammar", "40000 characters"),
        ({"guided_decoding_backend": "xgrammar"}, "guided_decoding_backend", "guidance"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "not supported"),
    ],
)
def test_what_is_refused(client: TestClient, fields: dict[str, Any], param: str, words: str) -> None:
    answer = ask(client, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert words in error["message"] and len(error["message"]) < 500 and "\n" not in error["message"]


def test_a_grammar_that_fails_on_the_way_is_a_400(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    real = grammars.Matcher._mask

    def mask(self: grammars.Matcher) -> Any:
        if self._count == 3:
            self._error = "lexer error: too many states"
            return None
        return real(self)

    monkeypatch.setattr(grammars.Matcher, "_mask", mask)
    answer = ask(client, guided_regex="[0-9]{30}")
    assert answer.status_code == 400 and "after 3 tokens: lexer error" in answer.json()["error"]["message"]


def test_a_runtime_that_cannot_and_a_missing_library_are_a_400(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = DoubleEngine()
    slots.unsupported = frozenset({"grammar"})
    answer = ask(client_of(slots, tmp_path / "slots"), guided_regex="a")
    slots.close()
    assert answer.status_code == 400 and "ONNX Runtime" in answer.json()["error"]["message"]

    def missing(*_: Any) -> Any:
        raise RuntimeMissingError(grammars.INSTALL)

    monkeypatch.setattr(grammar_pool, "_compiler", missing)
    answer = ask(client, guided_regex="a")
    assert answer.status_code == 400 and "gpt2-bundle[guided]" in answer.json()["error"]["message"]


def test_a_compilation_without_end_is_given_up_and_the_loop_runs_on(
    engine: SlotEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Endless:
        def compile(self, wanted: StructuredOutput) -> Any:
            time.sleep(1)
            raise InputError("never seen")

    monkeypatch.setattr(grammar_pool, "_compiler", lambda _: Endless())
    monkeypatch.setattr(grammar_pool, "COMPILE_SECONDS", 0.2)

    async def run() -> int:
        work = asyncio.ensure_future(
            grammar_pool.compile_grammar(engine, StructuredOutput("regex", "a"), "guided_regex")
        )
        turns = 0
        while not work.done():
            turns += 1
            await asyncio.sleep(0.005)
        with pytest.raises(FieldError, match=r"guided_regex is too complex: it takes over 0\.2 s"):
            work.result()
        return turns

    assert asyncio.run(run()) > 10


def test_other_protocols_say_that_they_do_not_have_it(client: TestClient) -> None:
    body = {"text_input": "A", "parameters": {"guided_regex": "a"}}
    answer = client.post("/v2/models/tiny/generate", json=body)
    assert answer.status_code == 400 and "guided_regex" in answer.json()["error"]
    answer = client.post("/v2/models/tiny/generate", json={"text_input": "A", "response_format": {"type": "text"}})
    assert answer.status_code == 200
