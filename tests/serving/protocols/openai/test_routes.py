"""OpenAI's protocol, asked by OpenAI's own client over a socket."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from google.protobuf import json_format
from starlette.testclient import TestClient
from tensorflow_serving.apis import get_model_status_pb2

from serving.entrypoints.http_app import build_app
from serving.server.registry import ServedModel
from serving.server.settings import Settings
from tests.closed_form import byte_tokenizer, greedy, logits_after
from tests.serving.double_engine import DoubleEngine, bundle_of, registry_of
from tests.serving.live_server import running
from tests.serving.protocols.open_inference.double_server import all_routes

TOKENIZER = byte_tokenizer()


def expected(prompt: str | list[int], count: int) -> str:
    ids = TOKENIZER.encode(prompt, add_special_tokens=False).ids if isinstance(prompt, str) else prompt
    text: str = TOKENIZER.decode(greedy(ids or [256], count, 257))
    return text


def test_a_text_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="Ab", temperature=0)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-") and answer.model == "tiny"
    (choice,) = answer.choices
    assert choice.text == expected("Ab", 16) and choice.finish_reason == "length" and choice.logprobs is None
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 16, 18)


@pytest.mark.parametrize(
    ("prompt", "each"),
    [
        (["Ab", "cd"], ["Ab", "cd"]),
        ([65, 66], [[65, 66]]),
        ([[65, 66], [7]], [[65, 66], [7]]),
        ("", [""]),
        ([""], [""]),
    ],
)
def test_every_form_of_prompt(client: openai.OpenAI, prompt: Any, each: list[Any]) -> None:
    answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=5, n=2, temperature=0)
    assert [choice.index for choice in answer.choices] == list(range(2 * len(each)))
    assert [choice.text for choice in answer.choices] == [expected(one, 5) for one in each for _ in range(2)]


def test_a_stream_gives_the_same_text_in_pieces(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="tiny",
            prompt=["Ab", "xyz"],
            max_tokens=40,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = ["", ""]
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [expected("Ab", 40), expected("xyz", 40)]
    ends = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert ends == ["length", "length"]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 80


def test_a_stream_is_server_sent_events_and_ends_with_done(raw: Any) -> None:
    answer = raw.post("/v1/completions", json={"prompt": "A", "max_tokens": 3, "stream": True, "temperature": 0})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["id"] for event in events[:-2])


def test_no_chunk_of_a_stream_with_logprobs_is_empty(tmp_path: Path) -> None:
    class Late(DoubleEngine):
        """Has read a prompt some time before its first token."""

        def _advance(self, row: Any) -> None:
            time.sleep(0.02)
            super()._advance(row)

    engine = Late()
    body = {"prompt": "A", "max_tokens": 3, "stream": True, "temperature": 0, "logprobs": 0}
    with TestClient(build_app(registry_of(engine, tmp_path / "tiny"), Settings())) as client:
        events = client.post("/v1/completions", json=body).text.split("\n\n")[:-2]
    engine.close()
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert all(choice["logprobs"]["tokens"] or choice["finish_reason"] for choice in choices)


@pytest.mark.parametrize("continuous", [False, True])
def test_usage_goes_with_each_chunk_where_asked_for(raw: Any, continuous: bool) -> None:
    options = {"include_usage": True, "continuous_usage_stats": continuous}
    body = {"prompt": "Ab", "max_tokens": 3, "stream": True, "temperature": 0, "stream_options": options}
    events = raw.post("/v1/completions", json=body).text.split("\n\n")[:-2]
    usages = [json.loads(event.removeprefix("data: "))["usage"] for event in events]
    assert usages[-1]["completion_tokens"] == 3
    counts = [usage and usage["completion_tokens"] for usage in usages[:-1]]
    if continuous:  # a chunk may hold several tokens: those that came while the one before was being written
        assert counts == sorted(counts) and counts[0] >= 1 and counts[-1] == 3
    else:
        assert counts == [None] * len(counts)


def test_the_fingerprint_is_that_of_every_file(tmp_path: Path) -> None:
    engine = DoubleEngine()
    bundle = bundle_of(tmp_path / "tiny", "tiny")
    first = bundle.manifest.artifacts[0]

    def fingerprint(content: bytes) -> str:
        changed = replace(
            bundle.manifest, artifacts=(first, replace(first, path="w", sha256=sha256(content).hexdigest()))
        )
        return ServedModel("tiny", 1, replace(bundle, manifest=changed), engine, 0).fingerprint

    engine.close()
    assert fingerprint(b"1") == fingerprint(b"1") != fingerprint(b"2")


def test_stop_texts_and_ids(client: openai.OpenAI) -> None:
    ids = greedy([65], 30, 257)
    whole = expected("A", 30)
    stop = whole[4:6]
    (choice,) = client.completions.create(model="tiny", prompt="A", max_tokens=30, temperature=0, stop=stop).choices
    assert choice.finish_reason == "stop" and choice.text == whole[: whole.index(stop)]
    assert choice.model_dump()["stop_reason"] == stop
    (choice,) = client.completions.create(
        model="tiny", prompt=[65], max_tokens=30, temperature=0, extra_body={"stop_token_ids": [ids[3]]}
    ).choices
    assert choice.finish_reason == "stop" and choice.model_dump()["stop_reason"] == ids[3]


def test_a_stop_text_that_is_a_special_token(client: openai.OpenAI) -> None:
    start = next(letter for letter in range(32, 127) if 256 in greedy([letter], 60, 257)[:-1])
    ids = greedy([start], 60, 257)
    (choice,) = client.completions.create(
        model="tiny",
        prompt=[start],
        max_tokens=60,
        temperature=0,
        stop=["<|endoftext|>"],
        extra_body={"ignore_eos": True, "return_token_ids": True},
    ).choices
    table = choice.model_dump()
    assert (choice.finish_reason, table["stop_reason"]) == ("stop", "<|endoftext|>")
    assert table["token_ids"] == ids[: ids.index(256) + 1]


@pytest.mark.parametrize("logprobs", [None, 0])
@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_are_given_where_asked_for(raw: Any, stream: bool, logprobs: int | None) -> None:
    # Halves of characters are among them, which are no text until the other half has come.
    ids = greedy([65], 30, 257)
    body = {"prompt": [[65], [66]], "max_tokens": 30, "temperature": 0, "ignore_eos": True, "logprobs": logprobs}
    answer = raw.post("/v1/completions", json={**body, "stream": stream, "return_token_ids": True})
    events = answer.text.split("\n\n")[:-2] if stream else [answer.text]
    choices = [choice for event in events for choice in json.loads(event.removeprefix("data: "))["choices"]]
    found: dict[int, list[int]] = {0: [], 1: []}
    for choice in choices:
        found[choice["index"]] += choice["token_ids"]
    assert found == {0: ids, 1: greedy([66], 30, 257)}
    plain = raw.post("/v1/completions", json=body).json()["choices"]
    assert all("token_ids" not in choice for choice in plain)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 6])
def test_echo_with_logprobs_scores_the_prompt_too(client: openai.OpenAI, stream: bool, max_tokens: int) -> None:
    made: Any = client.completions.create(
        model="tiny", prompt="Héy", max_tokens=max_tokens, temperature=0, echo=True, logprobs=2, stream=stream
    )
    chunks = list(made) if stream else [made]
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    keys = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    scores: dict[str, list[Any]] = {
        key: [item for chunk in chunks for choice in chunk.choices for item in getattr(choice.logprobs, key)]
        for key in keys
    }
    prompt = TOKENIZER.encode("Héy").ids
    ids = prompt + greedy(prompt, max_tokens, 257)
    assert text == "Héy" + (expected("Héy", max_tokens) if max_tokens else "")
    assert scores["tokens"][:4] == ["H", "bytes:\\xc3", "bytes:\\xa9", "y"] and len(scores["tokens"]) == len(ids)
    assert scores["text_offset"][:5] == [0, 1, 1, 2, 3][: len(ids)]
    assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
    for at in range(1, len(ids)):
        assert scores["token_logprobs"][at] == pytest.approx(float(logits_after(ids[:at], 257)[ids[at]]))
        assert 2 <= len(scores["top_logprobs"][at]) <= 3
        assert scores["top_logprobs"][at][scores["tokens"][at]] == scores["token_logprobs"][at]
    if not stream:
        assert made.usage.completion_tokens == max_tokens and made.choices[0].finish_reason == "length"


def test_a_prompt_that_fills_the_context_is_echoed_and_scored(client: openai.OpenAI) -> None:
    prompt = [place % 250 for place in range(1024)]
    for stream in (False, True):
        made: Any = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=0, echo=True, logprobs=0, stream=stream
        )
        choices = [choice for chunk in (made if stream else [made]) for choice in chunk.choices]
        scores = [value for choice in choices if choice.logprobs for value in choice.logprobs.token_logprobs]
        assert scores[0] is None and len(scores) == 1024
        assert scores[-1] == pytest.approx(float(logits_after(prompt[:-1], 257)[prompt[-1]]))
        assert choices[-1].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match="do not fit"):
        client.completions.create(model="tiny", prompt=[*prompt, 1], max_tokens=0, echo=True)


def test_zero_logprobs_reports_the_tokens_alone(client: openai.OpenAI) -> None:
    (choice,) = client.completions.create(model="tiny", prompt="A", max_tokens=4, temperature=0, logprobs=0).choices
    assert choice.logprobs is not None and choice.logprobs.top_logprobs is not None
    assert [len(top) for top in choice.logprobs.top_logprobs] == [1] * 4
    assert choice.logprobs.token_logprobs == [0.0] * 4


def test_models_and_tokens(client: openai.OpenAI, raw: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    card = client.models.retrieve("tiny").model_dump()
    assert card["created"] == 1_700_000_000
    assert card["model_version_status"][0]["state"] == "AVAILABLE"
    # TensorFlow Serving's clients ask neither for JSON nor with a key, and parse its message and nothing else.
    status = raw.get("/v1/models/tiny", headers={"Accept": "*/*"}).text
    parsed = json_format.Parse(status, get_model_status_pb2.GetModelStatusResponse())
    assert [(each.version, each.state) for each in parsed.model_version_status] == [(1, 30)]
    tokens = raw.post("/tokenize", json={"prompt": "Ab é", "return_token_strs": True}).json()
    assert tokens["tokens"] == TOKENIZER.encode("Ab é").ids and tokens["count"] == len(tokens["token_strs"])
    # Readable where a token is whole characters.
    assert tokens["token_strs"] == ["A", "b", " ", "bytes:\\xc3", "bytes:\\xa9"]
    assert card["example_prompt"] == "Return the"  # Its bundle has no held-out text.
    assert raw.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "Ab é"}


def test_kserves_client_of_its_v1_protocol_reads_that_server_and_model_are_ready(raw: Any) -> None:
    """KServe's client sends what httpx sends by itself, and reads nothing but `status` and `ready`."""
    own = {"User-Agent": "python-httpx/0.28.1", "Accept": "*/*"}
    assert raw.get("/", headers=own).json() == {"status": "alive"}
    card = raw.get("/v1/models/tiny", headers=own).json()
    assert (card["name"], card["ready"], card["id"]) == ("tiny", True, "tiny")
    browser = {**own, "Accept": "text/html,*/*"}
    assert raw.get("/", headers=browser).headers["content-type"].startswith("text/html")
    assert set(raw.get("/v1/models/tiny", headers={**own, "User-Agent": "python-requests/2.34"}).json()) == {
        "model_version_status"
    }


def test_an_unknown_model_is_told_in_the_form_of_the_client_that_asks(raw: Any) -> None:
    """TensorFlow Serving's and KServe's clients show `error` as a sentence; OpenAI's read its fields."""
    sentence = "no model 'none' is served here; there is 'tiny'"
    for headers in ({"Accept": "*/*"}, {"User-Agent": "python-httpx/0.28.1"}):
        answer = raw.get("/v1/models/none", headers=headers)
        assert answer.status_code == 404 and answer.json() == {"error": sentence}
    for headers in ({"Accept": "application/json"}, {"Authorization": "Bearer none"}):
        assert raw.get("/v1/models/none", headers=headers).json()["error"]["code"] == "model_not_found"


def test_a_number_without_a_fraction_is_an_integer(raw: Any) -> None:
    bodies = [{"prompt": "A", "max_tokens": tokens, "temperature": 0} for tokens in (3, 3.0)]
    choices = [raw.post("/v1/completions", json=body).json()["choices"] for body in bodies]
    assert choices[0] == choices[1] and choices[0][0]["finish_reason"] == "length"
    error = raw.post("/v1/completions", json={"prompt": "A", "max_tokens": 2.5}).json()["error"]
    assert error["message"] == "max_tokens: input should be a valid integer"


def test_null_and_unknown_fields_are_as_if_left_out(raw: Any) -> None:
    names = [
        "max_tokens",
        "top_p",
        "n",
        "best_of",
        "stop",
        "logprobs",
        "logit_bias",
        "seed",
        "suffix",
        "stream_options",
    ]
    body = {"prompt": "A", "temperature": 0, "user": "me", "made_up": {"a": 1}, **dict.fromkeys(names)}
    assert raw.post("/v1/completions", json=body).json()["choices"][0]["text"] == expected("A", 16)


def test_seeds_and_penalties_reach_the_engine(tmp_path: Path) -> None:
    engine = DoubleEngine()
    seen: list[Any] = []
    submit = engine.submit
    engine.submit = lambda request, listener: (seen.append(request), submit(request, listener))[1]  # type: ignore
    body = {
        "prompt": "A", "seed": -2, "top_k": -1, "min_p": 0.1, "repetition_penalty": 1.5, "presence_penalty": 1,
        "frequency_penalty": -1.5, "logit_bias": {"5": -100}, "min_tokens": 2, "ignore_eos": True, "top_p": 0.5,
    }  # fmt: skip
    with TestClient(build_app(registry_of(engine, tmp_path / "tiny"), Settings(request_timeout=9))) as client:
        client.post("/v1/completions", json=body, headers={"X-Request-Timeout": "2.5"})
        client.post("/v1/completions", json={"prompt": "A"}, headers={"X-Request-Timeout": "100"})
        for wrong in ("-1", "0", "inf", "nan", "soon"):
            answer = client.post("/v1/completions", json=body, headers={"X-Request-Timeout": wrong})
            assert answer.status_code == 400 and f"X-Request-Timeout is '{wrong}'" in answer.text
    first, second = seen
    params = first.params
    assert (params.seed, params.top_k, params.min_p, params.top_p) == (2**63 - 2, 0, 0.1, 0.5)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.5, 1, -1.5)
    assert (params.logit_bias, params.min_tokens, params.ignore_eos) == (((5, -100.0),), 2, True)
    assert params.temperature == 1.0 and 2.4 < (first.timeout or 0) <= 2.5 and 8.9 < (second.timeout or 0) <= 9
    assert second.params.seed != 0 and math.isfinite(second.params.seed)
    engine.close()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "A", "max_tokens": 2, "stream": True}),
        ("/v2/models/tiny/generate_stream", {"text_input": "A", "max_tokens": 2}),
    ],
)
def test_a_queued_stream_has_its_headers_at_once_and_pings(tmp_path: Path, path: str, body: dict[str, Any]) -> None:
    engine = DoubleEngine()
    engine.paused.set()
    registry, settings = registry_of(engine, tmp_path / "tiny"), Settings(ping_seconds=0.1)
    with (
        running(build_app(registry, settings, all_routes(registry, settings))) as url,
        httpx.stream("POST", url + path, json=body, timeout=5) as answer,
    ):
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()
        assert [next(lines) for _ in range(4)] == [": ping", "", ": ping", ""]
        engine.paused.clear()
        rest = list(lines)
        assert any(line.startswith("data: {") for line in rest)
        assert ": ping" not in rest[rest.index(next(line for line in rest if line.startswith("data"))) :]
    engine.close()


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_end_where_the_text_is_cut_at_a_stop(raw: Any, stream: bool) -> None:
    text = expected("A", 12)
    body = {"prompt": "A", "max_tokens": 12, "temperature": 0, "logprobs": 1, "stop": [text[5:8]], "stream": stream}
    answer = raw.post("/v1/completions", json=body)
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n") if line.startswith("data: {")]
    choices = [json.loads(line)["choices"][0] for line in lines] if stream else answer.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == text[:5]
    plain = raw.post("/v1/completions", json={**body, "stop": None, "stream": False}).json()["choices"][0]["logprobs"]
    kept = [place for place, offset in enumerate(plain["text_offset"]) if offset < 5]
    for key in ("tokens", "token_logprobs", "text_offset"):
        assert [item for choice in choices for item in choice["logprobs"][key]] == [plain[key][place] for place in kept]


def test_probes_and_the_version_are_where_other_servers_have_them(raw: Any) -> None:
    assert raw.get("/health").status_code == raw.get("/ping").status_code == 200
    assert raw.get("/version").json()["version"]
