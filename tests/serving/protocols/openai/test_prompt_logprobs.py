"""`prompt_logprobs` in vLLM's layout and `/tokenizer_info`, asked over a socket; values from a real model's logits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest

from serving.bundle import open_bundle
from serving.engine.config import EngineConfig
from serving.engine.engine import open_engine
from serving.entrypoints.http_app import build_app
from serving.server.registry import ModelRegistry, ServedModel, State
from serving.server.settings import Settings
from tests.closed_form import byte_tokenizer, write_bundle
from tests.oracles.fixtures import read_cases
from tests.serving.double_engine import DoubleEngine
from tests.serving.live_server import running


@pytest.fixture(scope="module")
def real(real_bundle: Path) -> Iterator[Any]:
    bundle = open_bundle(real_bundle)
    engine = open_engine(bundle, config=EngineConfig(slots=4))
    registry = ModelRegistry()
    registry.add(ServedModel("bytes", 1, bundle, engine, 0, State.AVAILABLE))
    with running(build_app(registry, Settings())) as url, httpx.Client(base_url=url) as client:
        yield client
    engine.close()


@pytest.mark.parametrize(("top", "most"), [(0, 0), (3, 0), (5, 4)])
def test_prompt_logprobs_are_those_of_the_models_logits(real: Any, top: int, most: int) -> None:
    fixture = read_cases("bytes")["full"]
    ids = fixture.ids[0, :40].tolist()
    body = {"prompt": ids, "max_tokens": most, "prompt_logprobs": top, "temperature": 0}
    answer = real.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    found = choice["prompt_logprobs"]
    assert len(found) == 40 and found[0] is None and choice["logprobs"] is None
    logits = fixture.logits[0, :39].astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for place, entries in enumerate(found[1:]):
        line, token = logs[place], ids[place + 1]
        order = np.argsort(-line, kind="stable")
        assert set(entries) == {str(token), *map(str, order[:top].tolist())}
        for key, entry in entries.items():
            assert entry["logprob"] == pytest.approx(line[int(key)], abs=2e-4)
            assert entry["rank"] == 1 + np.count_nonzero(line > line[int(key)])
        text = byte_tokenizer().decode([token], skip_special_tokens=False)
        name = entries[str(token)]["decoded_token"]
        assert name == text or ("\N{REPLACEMENT CHARACTER}" in text and name.startswith("bytes:\\x"))
    assert answer.json()["usage"]["completion_tokens"] == most


def test_echo_and_prompt_logprobs_each_have_their_own_number_of_tokens(real: Any) -> None:
    body = {"prompt": "abc", "max_tokens": 0, "echo": True, "logprobs": 1, "prompt_logprobs": 4}
    (choice,) = real.post("/v1/completions", json=body).json()["choices"]
    assert choice["text"] == "abc"
    for echoed, entries in zip(choice["logprobs"]["top_logprobs"][1:], choice["prompt_logprobs"][1:], strict=True):
        assert len(echoed) in (1, 2) and len(entries) in (4, 5)
    own = [
        entries[str(ord(letter) - 33)]["logprob"]
        for letter, entries in zip("bc", choice["prompt_logprobs"][1:], strict=True)
    ]
    assert choice["logprobs"]["token_logprobs"][1:] == own


def test_scored_prompts_do_not_change_what_follows(real: Any) -> None:
    prompt = read_cases("bytes")["full"].ids[1, :33].tolist()
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 1.1, "seed": 5, "return_token_ids": True, "n": 2}
    plain = real.post("/v1/completions", json=body).json()
    scored = real.post("/v1/completions", json={**body, "prompt_logprobs": 1}).json()
    assert [each["token_ids"] for each in scored["choices"]] == [each["token_ids"] for each in plain["choices"]]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt_logprobs": 1, "stream": True}, "not given in streams"),
        ({"prompt_logprobs": -1}, "greater than or equal to 0"),
        ({"prompt_logprobs": 99}, "less than or equal to 20"),
        ({"max_tokens": 0}, "takes 'echo' or 'prompt_logprobs'"),
    ],
)
def test_what_is_not_done_is_a_400_that_names_the_field(real: Any, fields: dict[str, Any], words: str) -> None:
    answer = real.post("/v1/completions", json={"prompt": "abc", **fields})
    assert answer.status_code == 400 and words in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] in fields


def test_tokenizer_info_is_the_bundles_configuration(tmp_path: Path, real: Any) -> None:
    plain = real.get("/tokenizer_info").json()
    assert plain["eos_token"] == plain["bos_token"] == "<|endoftext|>" and plain["tokenizer_class"] == "GPT2Tokenizer"
    assert plain["model_max_length"] == open_bundle_length(real)
    config = {
        "eos_token": {"content": "<x>", "special": True},
        "pad_token": {"content": "<p>"},
        "chat_template": "{{ 1 }}",
    }
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    write_bundle(folder)
    engine = DoubleEngine()
    registry = ModelRegistry()
    registry.add(ServedModel("tiny", 1, open_bundle(folder), engine, 0, State.AVAILABLE))
    with running(build_app(registry, Settings())) as url:
        info = httpx.get(f"{url}/tokenizer_info").json()
        missing = httpx.get(f"{url}/tokenizer_info", params={"model": "other"})
    engine.close()
    assert info["pad_token"] == "<p>" and info["chat_template"] == "{{ 1 }}" and info["eos_token"] == "<|endoftext|>"
    assert missing.status_code == 404


def open_bundle_length(client: Any) -> int:
    length: int = client.get("/v1/models").json()["data"][0]["max_model_len"]
    return length
