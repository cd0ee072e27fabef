"""Chat completions, asked by OpenAI's own client over a socket, and held to completions of the rendered text."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from starlette.testclient import TestClient

from serving.engine.api import GenerationRequest
from serving.entrypoints.http_app import build_app
from serving.protocols.openai.unsupported import CHAT_UNSUPPORTED
from serving.server.settings import Settings
from tests.closed_form import END, byte_tokenizer, chat_files, greedy, logits_after
from tests.serving.double_engine import DoubleEngine, registry_of
from tests.serving.live_server import running

TOKENIZER = byte_tokenizer()
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% if message.role == 'tool' %}{{ raise_exception('No tools here,\n' ~ message.content) }}{% endif %}"
    "{% if message.content == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    "{% endif %}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{{ mood }}{% endif %}"
)
CHAT: list[Any] = [{"role": "system", "content": "Bé brief."}, {"role": "user", "content": "Hi"}]
TEXT = "<system>Bé brief.\n<user>Hi\n<assistant>"


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False).ids)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, DoubleEngine]]:
    engine = DoubleEngine()
    registry = registry_of(engine, tmp_path_factory.mktemp("chat") / "tiny", extra=chat_files(TEMPLATE))
    with running(build_app(registry, Settings())) as base:
        yield base, engine
    registry.get("tiny").close()


@pytest.fixture(scope="module")
def url(server: tuple[str, DoubleEngine]) -> str:
    return server[0]


def test_an_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=CHAT, max_completion_tokens=9, temperature=0)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-") and answer.model == "tiny"
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.finish_reason == "length" and choice.logprobs is None
    assert choice.message.content == TOKENIZER.decode(greedy(ids_of(TEXT), 9, 257))
    assert answer.usage is not None
    counts = (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)
    assert counts == (len(ids_of(TEXT)), 9, len(ids_of(TEXT)) + 9)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_stream_is_a_role_then_content_then_an_end_then_usage(
    client: openai.OpenAI, n: int, logprobs: int | None
) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": CHAT, "max_tokens": 12, "temperature": 0, "n": n}
    if logprobs is not None:
        asked |= {"logprobs": True, "top_logprobs": logprobs}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 12 * n
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for index, choice in enumerate(whole.choices):
        mine = [each for chunk in chunks for each in chunk.choices if each.index == index]
        assert (mine[0].delta.role, mine[0].delta.content) == ("assistant", "")
        assert all(each.delta.role is None for each in mine[1:])
        assert "".join(each.delta.content or "" for each in mine) == choice.message.content
        assert [each.finish_reason for each in mine] == [None] * (len(mine) - 1) + ["length"]
        assert mine[-1].delta.model_dump(exclude_none=True) == {}
        tokens = [token for each in mine if each.logprobs for token in each.logprobs.content or []]
        assert tokens == (choice.logprobs.content if choice.logprobs else [])


def test_a_stream_is_server_sent_events_and_ends_with_done(raw: Any) -> None:
    body = {"messages": CHAT, "max_tokens": 3, "stream": True, "temperature": 0, "return_token_ids": True}
    answer = raw.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-2]]
    assert choices[0] == {
        "index": 0,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }
    assert [id for each in choices for id in each.get("token_ids", [])] == greedy(ids_of(TEXT), 3, 257)


def test_log_probabilities_have_each_tokens_bytes(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=40, temperature=0, logprobs=True, top_logprobs=2
    )
    (choice,) = answer.choices
    assert choice.logprobs is not None and choice.logprobs.content is not None and choice.message.content is not None
    ids = ids_of(TEXT)
    for token, id in zip(choice.logprobs.content, greedy(ids, 40, 257), strict=False):
        logits = logits_after(ids, 257)
        assert token.logprob == pytest.approx(float(logits[id])) and len(token.top_logprobs) == 2
        assert token.top_logprobs[0].token == token.token and token.top_logprobs[0].bytes == token.bytes
        assert token.top_logprobs[1].logprob == pytest.approx(-0.125)
        ids.append(id)
    joined = bytes(byte for token in choice.logprobs.content for byte in token.bytes or [])
    assert joined.decode("utf-8", "replace") == choice.message.content


FIELDS: list[dict[str, Any]] = [
    {"max_tokens": 30},
    {"max_tokens": 5, "n": 3, "seed": 7, "temperature": 0.9, "top_p": 0.9, "presence_penalty": 1.5},
    {"max_tokens": 30, "stop": ["\x07", "a"], "frequency_penalty": -1},
    {"max_tokens": 30, "stop_token_ids": [3, 65], "logit_bias": {"9": 2}, "top_k": 3, "min_p": 0.1, "min_tokens": 2},
    {"max_tokens": 40, "ignore_eos": True, "cache_salt": "s", "repetition_penalty": 1.2, "seed": -1},
]


@pytest.mark.parametrize("fields", FIELDS)
def test_chat_is_completions_of_the_rendered_text(
    raw: Any, server: tuple[str, DoubleEngine], monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    asked: list[GenerationRequest] = []
    submit = server[1].submit
    monkeypatch.setattr(
        server[1], "submit", lambda request, listener: asked.append(request) or submit(request, listener)
    )
    common = {**fields, "return_token_ids": True}
    chat = raw.post("/v1/chat/completions", json={"messages": CHAT, **common}).json()
    text = raw.post("/v1/completions", json={"prompt": TEXT, **common}).json()
    assert chat["usage"] == text["usage"]
    for mine, theirs in zip(chat["choices"], text["choices"], strict=True):
        assert mine["message"]["content"] == theirs["text"]
        assert [mine[key] for key in ("token_ids", "finish_reason", "stop_reason")] == [
            theirs[key] for key in ("token_ids", "finish_reason", "stop_reason")
        ]
    # The engine was asked the same, but for names, the time that is left and, without a seed, its random one.
    one, other = (
        {
            **vars(request),
            "request_id": "",
            "timeout": 0,
            "params": {**vars(request.params), "seed": fields.get("seed", 0) > 0},
        }
        for request in asked
    )
    assert one == other


def test_an_answer_may_fill_the_context_and_no_more(raw: Any) -> None:
    answer = raw.post("/v1/chat/completions", json={"messages": CHAT, "ignore_eos": True}).json()
    assert answer["usage"]["total_tokens"] == 1024 and answer["choices"][0]["finish_reason"] == "length"
    long = raw.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x" * 1100}]})
    error = long.json()["error"]
    assert (long.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    assert error["message"].startswith("This model's maximum context length is 1024 tokens")


def test_special_tokens_of_the_template_and_the_final_message(raw: Any) -> None:
    chat = [*CHAT, {"role": "assistant", "content": "Sure, "}]
    tokens = raw.post("/tokenize", json={"messages": chat}).json()
    begun = "<system>Bé brief.\n<user>Hi\n<assistant>Sure, "
    assert tokens["tokens"] == ids_of(f"{begun}{END}\n<assistant>") and 256 in tokens["tokens"]
    for fields, text in (
        ({"continue_final_message": True}, begun),
        ({"add_generation_prompt": False}, f"{begun}{END}\n"),
        ({"chat_template_kwargs": {"mood": "sad"}}, f"{begun}{END}\n<assistant>sad"),
    ):
        assert raw.post("/tokenize", json={"messages": chat, **fields}).json()["tokens"] == ids_of(text)
        body = {"messages": chat, "max_tokens": 4, "temperature": 0, **fields}
        content = raw.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        assert content == TOKENIZER.decode(greedy(ids_of(text), 4, 257))
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert raw.post("/tokenize", json={"messages": parts}).json()["tokens"] == ids_of("<user>a\nb\n<assistant>")


def test_an_answer_ends_at_the_end_of_turn_of_the_template(tmp_path: Path) -> None:
    # A ChatML model whose end token is another one: its turns end in <|im_end|>.
    form = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    engine = DoubleEngine()
    engine.tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    engine.vocab_size = 259
    prompts = [f"<|im_start|>user\n{'x' * count}<|im_end|>\n" for count in range(1, 90)]
    rows = [greedy(engine.tokenizer.encode(text, add_special_tokens=False).ids, 200, 259) for text in prompts]
    count, ids = next((at + 1, ids) for at, ids in enumerate(rows) if 258 in ids and 256 not in ids[: ids.index(258)])
    registry = registry_of(engine, tmp_path / "tiny", extra=chat_files(form))
    with TestClient(build_app(registry, Settings())) as client:
        body = {"messages": [{"role": "user", "content": "x" * count}], "temperature": 0, "return_token_ids": True}
        choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
        assert choice["finish_reason"] == "stop" and choice["token_ids"] == ids[: ids.index(258) + 1]
        assert "<|im_end|>" not in choice["message"]["content"]
        going_on = {**body, "ignore_eos": True, "max_tokens": 200}
        assert client.post("/v1/chat/completions", json=going_on).json()["choices"][0]["token_ids"] == ids
    registry.get("tiny").close()


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": None}, "messages", "list"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": CHAT * 1025}, "messages", "at most 2048"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages", "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages", "content is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "messages", "content is missing"),
        ({"messages": [{"role": "user", "content": []}]}, "messages", "1 to 256 parts"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages", "without a type"),
        (
            {"messages": [*CHAT, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
            "'image_url'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]}, "messages", "no string"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages", "tool_calls is not supported"),
        ({"messages": [{"role": "tool", "content": "21 C"}]}, "messages", "messages: No tools here, 21 C"),
        ({"messages": [{"role": "user", "content": "loop"}]}, "messages", "0.25 s of processor time"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 1024}, "max_tokens", "context"),
        ({"top_logprobs": 2}, "top_logprobs", "takes 'logprobs'"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"logprobs": 3}, "logprobs", "boolean"),
        ({"n": 5}, "n", "slots"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "'messages'"),
        ({"chat_template_kwargs": {"a": "x" * 2000}}, "chat_template_kwargs", "at most 1024"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            "set one to false",
        ),
        ({"response_format": {"type": "nonsense"}}, "response_format", "response_format"),
        ({"use_beam_search": True}, "use_beam_search", "use_beam_search"),
    ],
)
def test_a_wrong_field_is_named_in_one_sentence(raw: Any, fields: dict[str, Any], param: str, words: str) -> None:
    answer = raw.post("/v1/chat/completions", json={"messages": CHAT, **fields})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error", answer.text
    assert error["param"] == param and words in error["message"] and "\n" not in error["message"], error


@pytest.mark.parametrize("name", CHAT_UNSUPPORTED)
def test_what_is_not_done_is_refused_by_name(raw: Any, name: str) -> None:
    body = {"messages": CHAT, "max_tokens": 2}
    answer = raw.post("/v1/chat/completions", json={**body, name: [{"type": "function"}]})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == name
    for nothing in (None, *CHAT_UNSUPPORTED[name]):
        assert raw.post("/v1/chat/completions", json={**body, name: nothing}).status_code == 200, nothing


def test_a_hostile_conversation_holds_nobody(raw: Any, server: tuple[str, DoubleEngine]) -> None:
    slow = {"messages": [{"role": "user", "content": "loop"}]}
    with ThreadPoolExecutor() as threads:
        answers = [threads.submit(httpx.post, f"{server[0]}/v1/chat/completions", json=slow, timeout=60) for _ in "123"]
        done = 0
        while not any(answer.done() for answer in answers):
            assert raw.post("/v1/completions", json={"prompt": "A", "max_tokens": 2}).status_code == 200
            done += 1
        assert done > 3
        assert {answer.result().status_code for answer in answers} == {400}


def test_who_leaves_is_not_answered_and_the_next_one_is(raw: Any, server: tuple[str, DoubleEngine]) -> None:
    slow = {"messages": [{"role": "user", "content": "loop"}]}
    with ThreadPoolExecutor() as threads:
        for _ in range(6):
            threads.submit(httpx.post, f"{server[0]}/v1/chat/completions", json=slow, timeout=0.05)
    began = time.monotonic()
    assert raw.post("/v1/chat/completions", json={"messages": CHAT, "max_tokens": 2}).status_code == 200
    assert time.monotonic() - began < 20
    late = raw.post("/v1/chat/completions", json=slow, headers={"X-Request-Timeout": "0.05"})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")


def test_a_model_without_a_template_names_completions(tmp_path: Path) -> None:
    engine = DoubleEngine()
    with TestClient(build_app(registry_of(engine, tmp_path / "tiny"), Settings())) as client:
        for path in ("/v1/chat/completions", "/tokenize"):
            answer = client.post(path, json={"messages": CHAT})
            assert answer.status_code == 400 and "/v1/completions" in answer.json()["error"]["message"]
        wrong = client.post("/chat/completions", json={"messages": CHAT})
        assert wrong.status_code == 404 and "/v1/chat/completions" in wrong.json()["error"]["message"]
        for body in ({}, {"prompt": "a", "messages": CHAT}):
            assert "not both" in client.post("/tokenize", json=body).json()["error"]["message"]
        assert client.post("/tokenize", json={"messages": CHAT, "tools": [1]}).json()["error"]["param"] == "tools"
    engine.close()


def test_keys_limits_and_metrics_are_those_of_completions(tmp_path: Path) -> None:
    engine = DoubleEngine()
    registry = registry_of(engine, tmp_path / "tiny", extra=chat_files(TEMPLATE))
    settings = Settings(api_keys=("a-key-for-tests",), rate_limit=3, max_prompt_tokens=40)
    body = {"messages": CHAT, "max_tokens": 2}
    with TestClient(build_app(registry, settings)) as client:
        assert client.post("/v1/chat/completions", json=body).status_code == 401
        client.headers["Authorization"] = "Bearer a-key-for-tests"
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        long = client.post("/v1/chat/completions", json={"messages": [*CHAT, *CHAT]})
        assert long.status_code == 400 and "at most 40" in long.json()["error"]["message"]
        client.post("/v1/chat/completions", json=body)
        assert client.post("/v1/chat/completions", json=body).status_code == 429
        assert 'path="/v1/chat/completions"' in client.get("/metrics").text
    registry.get("tiny").close()
