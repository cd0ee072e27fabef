"""What OpenAI's protocol answers to requests that are wrong, in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient

from serving.entrypoints.http_app import build_app
from serving.server.settings import Settings
from tests.serving.double_engine import DoubleEngine, registry_of


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"suffix": "x"}, "suffix", "suffix"),
        ({"best_of": 3}, "best_of", "best_of"),
        ({"max_tokens": 0}, "max_tokens", "echo"),
        ({"max_tokens": "4"}, "max_tokens", "integer"),
        ({"max_tokens": 2.5}, "max_tokens", "integer"),
        ({"max_tokens": 2.0, "n": 0}, "n", "greater"),
        ({"max_tokens": 1024}, "max_tokens", "context"),
        ({"n": 0}, "n", "greater"),
        ({"n": 5}, "n", "slots"),
        ({"temperature": -1}, "temperature", "greater"),
        ({"top_p": 0}, "top_p", "greater"),
        ({"logprobs": 21}, "logprobs", "20"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "100"),
        ({"stop": ["x"] * 17}, "stop", "16"),
        ({"stop": ""}, "stop", "non-empty"),
        ({"stop": ["x", "y" * 1025]}, "stop", "1024 characters"),
        ({"logit_bias": {str(index): 1 for index in range(258)}}, "logit_bias", "more ids than the vocabulary, 257"),
        ({"prompt": [1, "a"]}, "prompt", "list"),
        ({"prompt": [[]]}, "prompt", "list"),
        ({"prompt": {"a": 1}}, "prompt", "string"),
        ({"prompt": [300]}, "prompt", "vocabulary"),
        ({"prompt": ["a"] * 6}, "prompt", "at most 5"),
        ({"seed": 2**70}, "seed", "less"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ],
)
def test_a_wrong_field_is_named_in_one_sentence(raw: Any, fields: dict[str, Any], param: str, words: str) -> None:
    answer = raw.post("/v1/completions", json={"prompt": "A", **fields})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error", answer.text
    assert error["param"] == param and words in error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize(
    ("content", "media_type", "words"),
    [
        (b"{", "application/json", "not JSON"),
        (b"[1]", "application/json", "object"),
        (b'{"prompt": "\\ud800"}', "application/json", ""),
        (b'{"prompt": NaN}', "application/json", ""),
        (b'{"prompt": "\xff"}', "application/json", ""),
        (b"[" * 100_000, "application/json", ""),
        (b'{"prompt": "A"}', "text/plain", "Content-Type"),
    ],
)
def test_a_malformed_body_is_a_400(raw: Any, content: bytes, media_type: str, words: str) -> None:
    answer = raw.post("/v1/completions", content=content, headers={"Content-Type": media_type})
    assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text


def test_unknown_models_and_paths(client: openai.OpenAI, raw: Any) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt="A")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert raw.get("/v1/completions").status_code == 405
    assert raw.get("/v1/completions").headers["allow"] == "POST"
    assert raw.get("/v1/nothing").json()["error"]["message"] == "there is nothing at /v1/nothing"


def test_an_engine_that_fails_says_nothing_of_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = DoubleEngine()
    engine.broken = "secret /path"
    with TestClient(build_app(registry_of(engine, tmp_path / "tiny"), Settings())) as client:
        answer = client.post("/v1/completions", json={"prompt": "A"}, headers={"X-Request-Id": "req-7"})
        assert answer.status_code == 500 and "secret" not in answer.text and answer.headers["x-request-id"] == "req-7"
        record = next(record for record in caplog.records if record.levelname == "ERROR")
        assert record.request_id == "req-7" and "secret" in str(record.exc_info)  # type: ignore[attr-defined]
    engine.close()


@pytest.mark.parametrize("most", [{"max_tokens": 3}, {"max_tokens": 0, "echo": True}, {}])
def test_more_tokens_at_least_than_at_most_are_refused(raw: Any, most: dict[str, Any]) -> None:
    fits = {"prompt": "A", **most, "min_tokens": most.get("max_tokens", 16)}
    assert raw.post("/v1/completions", json=fits).status_code == 200
    answer = raw.post("/v1/completions", json={**fits, "min_tokens": fits["min_tokens"] + 1})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "min_tokens" and "max_tokens" in error["message"]


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(raw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # 1024 positions; the longest token is "<|endoftext|>" with 13 bytes.
    monkeypatch.setattr("serving.protocols.texts._encode", lambda *_: pytest.fail("encoded"))
    answer = raw.post("/v1/completions", json={"prompt": "a" * (13 * 1024 + 1)})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["code"] == "context_length_exceeded"
    assert error["message"].startswith("This model's maximum context length is 1024 tokens; ")
    monkeypatch.undo()
    answer = raw.post("/v1/completions", json={"prompt": "a" * 13 * 1024})
    assert answer.status_code == 400 and f"a prompt of {13 * 1024}" in answer.json()["error"]["message"]
