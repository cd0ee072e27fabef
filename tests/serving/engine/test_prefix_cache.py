"""The prefix cache: whose prompts share, in what multiples, and not at all where it is off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from serving.engine.config import EngineConfig
from serving.engine.engine import SlotEngine
from serving.entrypoints.http_app import build_app
from serving.server.settings import Settings
from tests.closed_form import ClosedFormSlotBackend
from tests.serving.double_engine import registry_of
from tests.serving.engine.harness import EOS, TOKENIZER, Stepped, wanted

PROMPT = [65 + index % 20 for index in range(40)]


def cached(stepped: Stepped, salt: str = "") -> int:
    heard, _ = stepped.submit(PROMPT, max_new_tokens=2, cache_salt=salt)
    stepped.run()
    assert heard.prompt is not None and heard.ids() == wanted(heard.request, 0)[0]
    return heard.prompt.cached_tokens


def test_only_requests_of_the_same_salt_share() -> None:
    stepped = Stepped()
    assert [cached(stepped, salt) for salt in ("", "", "a", "b", "a", "b", "")] == [0, 32, 0, 0, 32, 32, 32]


def test_a_slot_is_not_taken_over_under_another_salt() -> None:
    stepped = Stepped(copies=False)
    assert [cached(stepped, salt) for salt in ("a", "a", "b", "b", "a")] == [0, 32, 0, 32, 0]


def test_a_slot_that_is_saved_keeps_its_salt() -> None:
    stepped = Stepped(slots=2)
    assert cached(stepped, "a") == 0
    for _ in range(3):
        assert [cached(stepped, "b"), cached(stepped, "a")][1] in (0, 32)
    assert cached(stepped, "c") == 0, "nobody's prompt was seen with this salt"


@pytest.mark.parametrize(("chunk", "share"), [(4096, 32), (17, 32), (None, 32), (8, 32), (4, 36)])
def test_the_granularity_does_not_grow_with_the_prefill_chunk(chunk: int | None, share: int) -> None:
    stepped = Stepped(chunk=chunk)
    assert [cached(stepped), cached(stepped)] == [0, share]


def test_the_cache_can_be_switched_off() -> None:
    stepped = Stepped(prefix_cache=False)
    assert [cached(stepped), cached(stepped)] == [0, 0]


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    engine = SlotEngine(ClosedFormSlotBackend(4, 64, 16, True), TOKENIZER, EOS, EngineConfig(slots=4))
    registry = registry_of(engine, tmp_path / "tiny")  # type: ignore[arg-type]
    with TestClient(build_app(registry, Settings(api_keys=("first-key", "second-key")))) as client:
        yield client
    engine.close()


def test_keys_do_not_see_what_others_asked(client: TestClient) -> None:
    def ask(key: str, **fields: str) -> int:
        body = {"prompt": PROMPT, "max_tokens": 2, "temperature": 0, **fields}
        answer = client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"}).json()
        found: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found

    assert [ask("first-key"), ask("first-key"), ask("second-key"), ask("second-key")] == [0, 32, 0, 32]
    assert [ask("first-key", cache_salt="x"), ask("first-key", cache_salt="x"), ask("first-key")] == [0, 32, 32]
