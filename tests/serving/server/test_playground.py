"""The page at "/": what is sent, and what a browser makes of it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from serving.entrypoints.http_app import build_app
from serving.server.playground import PATHS
from serving.server.settings import Settings
from tests.closed_form import byte_tokenizer, chat_files, greedy
from tests.serving.chromium import CHROMIUM, Browser, browser
from tests.serving.double_engine import DoubleEngine, registry_of
from tests.serving.live_server import running

KEY = "a-key-for-tests"
PICTURES = os.environ.get("PLAYGROUND_PICTURES")
"""A folder for pictures of the page, for someone to look at."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    engine = DoubleEngine(pace=0.01)
    registry = registry_of(engine, tmp_path_factory.mktemp("playground") / "tiny")
    with running(build_app(registry, Settings(api_keys=(KEY,)))) as base:
        yield base
    engine.close()


def test_the_files_are_served_without_a_key_and_allow_nothing_from_elsewhere(tmp_path: Path) -> None:
    engine = DoubleEngine()
    with TestClient(build_app(registry_of(engine, tmp_path / "tiny"), Settings(api_keys=(KEY,)))) as client:
        assert client.get("/v1/models").status_code == 401
        for path in PATHS:
            answer = client.get(path)
            assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
            policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
            assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
            assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
            assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|document\.write|\bon\w+=", answer.text), path
            assert "<style" not in answer.text and not re.search(r"<script(?! src=)", answer.text)
        assert "text/html" in client.get("/").headers["content-type"]
        for name in re.findall(r'(?:src|href)="([^"]+)"', client.get("/").text):
            if not name.startswith("data:"):
                assert client.get(f"/{name}", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200, name
    engine.close()


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed here")
def test_a_browser_generates_stops_and_shows_probabilities(url: str, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as page:
        page.screen(1280, 860)
        page.open(url)
        page.wait("!document.getElementById('locked').hidden")  # The key is asked for, and nothing else works before.
        page.wait("document.getElementById('error').textContent.includes('API key')")
        page.run(f"document.getElementById('key').value = {json.dumps(KEY)}")
        page.run("document.getElementById('key').dispatchEvent(new Event('change'))")
        page.wait("document.getElementById('model').value === 'tiny'")
        page.events.clear()  # The refusals above are errors of the console too.

        generate(page, "<b>A", temperature=0, max_tokens=40)
        page.wait("document.getElementById('ended').textContent === 'length'")
        ids = greedy(byte_tokenizer().encode("<b>A", add_special_tokens=False).ids, 40, 257)
        expected = byte_tokenizer().decode(ids)
        assert page.run("document.getElementById('output').textContent").replace("<|endoftext|>", "") == expected
        assert page.run("getComputedStyle(document.getElementById('output'), '::before').content") == '"<b>A"'
        assert page.run("document.getElementById('output').children.length") == 40
        assert page.run("document.getElementById('count').textContent") == "40"
        assert float(page.run("document.getElementById('rate').textContent")) > 1
        assert page.run("document.getElementById('first').textContent").endswith(" ms")

        page.run(
            "document.querySelector('#output span:nth-child(9)').dispatchEvent(new Event('click', {bubbles: true}))"
        )
        assert page.run("document.querySelectorAll('#card div').length") >= 5
        assert page.run("document.querySelector('#card .own i').textContent") == "100.0 %"

        generate(page, "A", temperature=0, max_tokens=1000)
        page.wait("document.getElementById('output').children.length > 3")
        page.run("document.getElementById('stop').click()")
        page.wait("document.getElementById('ended').textContent === 'you'")
        assert page.run("document.getElementById('error').hidden")

        assert page.complaints() == []
        generate(page, "A" * 1000, temperature=0, max_tokens=63)  # Together over the context: it ends there.
        page.wait("document.getElementById('ended').textContent === 'length'")
        assert page.run("document.getElementById('count').textContent") == "24"
        generate(page, "A" * 1024, temperature=0, max_tokens=1000)
        page.wait("!document.getElementById('error').hidden")
        assert "context" in page.run("document.getElementById('error').textContent")
        assert all(address.startswith((url, "data:")) for address in page.requested())


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed here")
def test_a_chat_has_turns(tmp_path: Path) -> None:
    form = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    engine = DoubleEngine()
    registry = registry_of(engine, tmp_path / "tiny", extra=chat_files(form))
    tokenizer = byte_tokenizer()

    def answer(text: str) -> str:
        ids = greedy(tokenizer.encode(text, add_special_tokens=False).ids, 30, 257)
        return tokenizer.decode(ids[: ids.index(256) if 256 in ids else None])

    with running(build_app(registry, Settings())) as url, browser(tmp_path / "profile") as page:
        page.screen(1280, 860)
        page.open(url)
        page.wait("!document.getElementById('modes').hidden")
        page.run("document.getElementById('chat').click()")
        page.wait("document.getElementById('prompt').value === 'Hello'")  # Its bundle has no held-out text.
        generate(page, "<b>Hi", system="Be.", temperature=0, max_tokens=30)
        page.wait("document.getElementById('prompt').value === ''")
        first = answer("<system>Be.<user><b>Hi<assistant>")
        texts = "[...document.querySelectorAll('#output .turn')].map((turn) => turn.textContent)"
        assert page.run(texts)[:2] == ["Be.", "<b>Hi"]
        assert page.run(texts)[2].replace("<|endoftext|>", "") == first
        page.run("document.querySelector('#output .turn span').dispatchEvent(new Event('click', {bubbles: true}))")
        assert page.run("document.querySelectorAll('#card div').length") >= 5
        generate(page, "More", temperature=0, max_tokens=30)
        page.wait("document.getElementById('prompt').value === ''")
        assert len(page.run(texts)) == 5
        second = answer(f"<system>Be.<user><b>Hi<assistant>{first}<user>More<assistant>")
        assert page.run(texts)[4].replace("<|endoftext|>", "") == second
        if PICTURES:
            page.picture(Path(PICTURES) / "playground-chat.png")
        page.run("document.getElementById('fresh').click()")
        assert page.run(texts) == []
        page.run("document.getElementById('complete').click()")
        page.wait("document.getElementById('prompt').value === 'Return the'")
        generate(page, "A", temperature=0, max_tokens=30)
        page.wait("document.getElementById('output').children.length > 3")
        assert page.complaints() == []
    registry.get("tiny").close()


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed here")
def test_a_runtime_without_probabilities_streams_text_alone(tmp_path: Path) -> None:
    engine = DoubleEngine()
    engine.unsupported = frozenset({"logprobs"})
    registry = registry_of(engine, tmp_path / "tiny")
    with running(build_app(registry, Settings())) as url, browser(tmp_path / "profile") as page:
        page.open(url)
        page.wait("document.getElementById('model').value === 'tiny'")
        generate(page, "A", temperature=0, max_tokens=40)
        page.wait("document.getElementById('ended').textContent === 'length'")
        expected = byte_tokenizer().decode(greedy(byte_tokenizer().encode("A", add_special_tokens=False).ids, 40, 257))
        assert page.run("document.getElementById('output').textContent") == expected
        assert page.run("document.getElementById('count').textContent") == "40"
        assert page.run("document.getElementById('error').hidden")
    engine.close()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed here")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_screen(url: str, tmp_path: Path, width: int, dark: bool) -> None:
    with browser(tmp_path / "profile") as page:
        page.screen(width, 844, dark)
        page.open(url)
        page.run(f"document.getElementById('key').value = {json.dumps(KEY)}")
        generate(page, "Return the number of", temperature=0, max_tokens=200)
        page.wait("document.getElementById('ended').textContent === 'length'")
        page.run(
            "document.querySelector('#output span:nth-child(60)').dispatchEvent(new Event('click', {bubbles: true}))"
        )
        assert page.run("document.documentElement.scrollWidth") <= width
        box = page.run("JSON.stringify(document.getElementById('card').getBoundingClientRect())")
        assert json.loads(box)["left"] >= 0 and json.loads(box)["right"] <= page.run(
            "document.documentElement.clientWidth"
        )
        shares = page.run("[...document.querySelectorAll('#card i')].map((share) => share.textContent).join()")
        assert "e" not in shares and "%" in shares
        if PICTURES:
            page.picture(Path(PICTURES) / f"playground-{width}{'-dark' if dark else ''}.png")


def generate(page: Browser, prompt: str, **fields: float) -> None:
    for name, value in {"prompt": prompt, **fields}.items():
        page.run(f"document.getElementById({json.dumps(name)}).value = {json.dumps(value)}")
    page.run("document.getElementById('generate').click()")
