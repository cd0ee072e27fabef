"""A server of OpenAI's protocol over a double of the engine, and its clients, for a whole module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from serving.entrypoints.http_app import build_app
from serving.server.settings import Settings
from tests.serving.double_engine import DoubleEngine, registry_of
from tests.serving.live_server import running


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    engine = DoubleEngine()
    registry = registry_of(engine, tmp_path_factory.mktemp("openai") / "tiny")
    with running(build_app(registry, Settings(max_prompts=5))) as base:
        yield base
    engine.close()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def raw(url: str) -> Iterator[Any]:
    with openai.DefaultHttpxClient(base_url=url) as raw:
        yield raw
