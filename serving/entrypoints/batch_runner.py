"""An offline batch: the requests of a file through the server's own application, without a socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

from starlette.types import ASGIApp, Message

from serving.entrypoints.batch_files import AnswerFile, BatchRequest, LineError, parse_line, request_lines


async def run_batch(
    app: ASGIApp,
    requests: Path,
    answers: AnswerFile,
    *,
    concurrency: int,
    max_body: int,
    progress: Callable[[], None] | None = None,
) -> None:
    """Answer each line of `requests` that `answers` has no answer of, `concurrency` at a time, in the order of coming.

    Wrong lines become lines of errors, and the rest goes on. `max_body` is in bytes. `progress` is called after each
    answer. Raises OSError if an answer cannot be written.
    """
    try:
        await _run(app, requests, answers, concurrency, max_body, progress)
    except BaseExceptionGroup as group:  # Of several that failed alike, the first says it.
        raise group.exceptions[0] from None


async def _run(
    app: ASGIApp,
    requests: Path,
    answers: AnswerFile,
    concurrency: int,
    max_body: int,
    progress: Callable[[], None] | None,
) -> None:
    room = asyncio.Semaphore(concurrency)
    async with asyncio.TaskGroup() as group:

        async def answer(request: BatchRequest) -> None:
            try:
                status, request_id, body = await call(app, request.url, request.body)
                answers.add_answer(request.custom_id, status, request_id, body)
                if progress is not None:
                    progress()
            finally:
                room.release()

        for request in unanswered(requests, answers, max_body):
            await room.acquire()
            group.create_task(answer(request))


def unanswered(requests: Path, answers: AnswerFile, max_body: int) -> Iterator[BatchRequest]:
    """The requests of the file that `answers` has no answer of; wrong lines become lines of errors there."""
    for number, line in request_lines(requests, max_body):
        try:
            if line is None:
                raise LineError("too_long", f"the line is over {max_body} bytes; split it, or raise --max-body")
            request = parse_line(line)
            if answers.has_id(request.custom_id):
                continue
        except LineError as error:
            if not answers.has_line(number):
                answers.add_error(number, error)
            continue
        yield request


async def call(app: ASGIApp, url: str, body: bytes) -> tuple[int, str, bytes]:
    """Post JSON to `app`: the answer's status, the request's id, and its body as JSON without line breaks."""
    path, _, query = url.partition("?")
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode("utf-8", "replace"),
        "root_path": "",
        "query_string": query.encode("utf-8", "replace"),
        "headers": [*headers, (b"content-length", b"%d" % len(body))],
        "client": ("127.0.0.1", 0),
        "server": ("localhost", None),
    }
    taken = False
    status, request_id, chunks, json_body = 0, "", [], False

    async def receive() -> Message:
        nonlocal taken
        if taken:  # The caller stays until the answer is there.
            await asyncio.Event().wait()
        taken = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status, request_id, json_body
        if message["type"] == "http.response.start":
            status = message["status"]
            given = {name.lower(): value for name, value in message["headers"]}
            request_id = given.get(b"x-request-id", b"").decode("latin-1")
            json_body = given.get(b"content-type", b"").partition(b";")[0].strip() == b"application/json"
        elif message["type"] == "http.response.body":
            chunks.append(message.get("body", b""))

    await app(scope, receive, send)
    data = b"".join(chunks)
    if not json_body:
        return status, request_id, json.dumps(data.decode("utf-8", "replace")).encode()
    if b"\n" in data or b"\r" in data:
        with contextlib.suppress(ValueError):
            data = json.dumps(json.loads(data)).encode()
    return status, request_id, data
