"""Offline batches: each request answered once, whatever was cut off before, and wrong lines beside right ones."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from serving.entrypoints.batch_files import AnswerFile, request_lines
from serving.entrypoints.batch_runner import run_batch
from serving.entrypoints.http_app import build_app
from serving.errors import GPT2BundleError, InputError
from serving.server.settings import Settings
from tests.serving.double_engine import DoubleEngine, registry_of
from tests.serving.live_server import running

MOST = 1 << 20


def line(custom_id: Any, url: str = "/v1/completions", **body: Any) -> str:
    given = {"prompt": "Ab", "max_tokens": 5, "temperature": 0, **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": given})


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    engine = DoubleEngine()
    yield build_app(registry_of(engine, tmp_path_factory.mktemp("batch") / "tiny"), Settings())
    engine.close()


def run(app: Any, requests: Path, answers: Path, concurrency: int = 4) -> tuple[int, int]:
    with AnswerFile(answers) as written:
        asyncio.run(run_batch(app, requests, written, concurrency=concurrency, max_body=MOST))
        return written.answered, written.failed


def read(path: Path) -> list[Any]:
    return [json.loads(each) for each in path.read_text().splitlines()]


def test_answers_are_the_servers(app: Any, tmp_path: Path) -> None:
    requests = tmp_path / "in.jsonl"
    bodies = {
        "text": ("/v1/completions", {"prompt": "Ab", "max_tokens": 9, "temperature": 0, "n": 2, "logprobs": 2}),
        "ids": ("/v1/completions", {"prompt": [65, 66], "max_tokens": 3, "temperature": 0}),
        "tokens": ("/tokenize", {"prompt": "häh\u2028"}),
        "wrong": ("/v1/completions", {"prompt": "Ab", "temperature": -1}),
        "lost": ("/v1/nothing?a=b", {}),
        "half \ud800": ("/detokenize", {"tokens": [1, 2]}),
    }
    lines = [json.dumps({"custom_id": key, "method": "POST", "url": url, "body": body})
             for key, (url, body) in bodies.items()]  # fmt: skip
    requests.write_text("\ufeff" + "\n\n".join(lines))
    assert run(app, requests, tmp_path / "out.jsonl") == (6, 2)
    answers = {each["custom_id"]: each for each in read(tmp_path / "out.jsonl")}
    assert answers.keys() == bodies.keys() and len({each["id"] for each in answers.values()}) == 6
    with running(app) as url, httpx.Client(base_url=url) as client:
        for key, (path, body) in bodies.items():
            served, answer = client.post(path, json=body), answers[key]
            assert answer["error"] is None and answer["response"]["status_code"] == served.status_code
            assert len(answer["response"]["request_id"]) == 32
            found, wanted = answer["response"]["body"], served.json()
            for one in (found, wanted):
                one.pop("id", None), one.pop("created", None)
            assert found == wanted


def test_wrong_lines_become_errors_and_stop_nothing(app: Any, tmp_path: Path) -> None:
    requests, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = [line("first"), line("last")]
    wrong = {
        "not json": "invalid_json",
        "[" * 100_000: "invalid_json",
        '{"custom_id": 1' + "0" * 5000 + "}": "invalid_json",
        "[]": "invalid_line",
        line(7): "invalid_custom_id",
        line(""): "invalid_custom_id",
        line("x" * 1025): "invalid_custom_id",
        line("get").replace('"POST"', '"GET"'): "invalid_method",
        line("far", url="https://example.org/v1/completions"): "invalid_url",
        line("bare").replace('"body": {', '"body": [], "b": {'): "invalid_body",
        line("streams", stream=True): "invalid_body",
        line("first", prompt="other"): "duplicate_custom_id",
        line("long", prompt="x" * (MOST + 70_000)): "too_long",
    }
    requests.write_bytes("\n".join([good[0], *wrong, good[1]]).encode() + b"\n\xff\xfe\n")
    for _ in range(2):
        assert run(app, requests, answers) == (16, 14)
        found = read(answers)
        errors = {each["error"]["line"]: each["error"]["code"] for each in found if each["error"]}
        assert errors == dict(enumerate(wrong.values(), 2)) | {16: "invalid_json"}
        assert {each["custom_id"] for each in found if each["response"]} == {"first", "last"}
        assert all(len(each["error"]["message"]) < 300 for each in found if each["error"])


def test_whatever_is_cut_off_is_answered_again_and_nothing_twice(app: Any, tmp_path: Path) -> None:
    requests, whole, cut = tmp_path / "in.jsonl", tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    requests.write_text("\n".join([*(line(f"é{number}") for number in range(6)), "wrong", line("é0")]))
    assert run(app, requests, whole) == (8, 2)
    data = whole.read_bytes()
    for end in {0, *range(len(data) - 700, len(data), 41), *range(1, len(data), 233)}:
        cut.write_bytes(data[:end])
        assert run(app, requests, cut) == (8, 2)
        assert cut.read_bytes().startswith(data[: data[:end].rfind(b"\n") + 1]), "what is whole stays"
        identities = Counter(
            str(each["custom_id"]) + str(each["error"] and each["error"]["line"]) for each in read(cut)
        )
        assert set(identities.values()) == {1} and len(identities) == 8


def test_no_more_requests_are_under_way_than_asked_for(tmp_path: Path) -> None:
    requests, under_way, most = tmp_path / "in.jsonl", 0, 0
    requests.write_text("\n".join(line(str(number)) for number in range(200)))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await receive()
        await asyncio.sleep(0.001)
        under_way -= 1
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"said\nso"})

    assert run(app, requests, tmp_path / "out.jsonl", concurrency=7) == (200, 0)
    assert most == 7
    assert {each["response"]["body"] for each in read(tmp_path / "out.jsonl")} == {"said\nso"}


def test_one_line_is_in_memory_however_long_the_file_is(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    process = os.fork()
    if not process:
        with pipe.open("wb") as file:
            for _ in range(40):
                file.write(b"x" * 1_000_000)
            file.write(b"\nshort\n")
        os._exit(0)
    import tracemalloc

    tracemalloc.start()
    assert list(request_lines(pipe, 1000)) == [(1, None), (2, b"short\n")]
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    os.waitpid(process, 0)


def test_a_file_that_is_something_else_is_refused_and_left_as_it_is(app: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    for text in ("hello\n", '{"a": 1}\n', "[]\n", '{"custom_id": "a", "response": {}}\nhalf'):
        other.write_text(text)
        with pytest.raises(InputError, match="line 1 is not an answer of a batch"):
            AnswerFile(other)
        assert other.read_text() == text
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a plain file"):
        AnswerFile(tmp_path / "pipe")
    with AnswerFile(tmp_path / "out.jsonl"), pytest.raises(GPT2BundleError, match="another process writes to it"):
        AnswerFile(tmp_path / "out.jsonl")


def test_an_answer_that_cannot_be_written_ends_the_batch_and_leaves_no_half(
    app: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text("\n".join(line(str(number)) for number in range(20)))
    write, room = os.write, 3000

    def full(file: int, data: Any) -> int:
        nonlocal room
        if len(data) > room and room > 10:
            room = 10
            return write(file, data[:10])
        if len(data) > room:
            raise OSError(28, "No space left on device")
        room -= len(data)
        return write(file, data)

    monkeypatch.setattr("serving.entrypoints.batch_files.os.write", full)
    with pytest.raises(OSError, match="No space left"):
        run(app, requests, answers)
    monkeypatch.undo()
    assert 1 <= len(read(answers)) < 20 and answers.read_bytes().endswith(b"\n")
    assert run(app, requests, answers) == (20, 0)
