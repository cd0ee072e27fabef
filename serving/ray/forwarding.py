"""A request on its way from the ingress to a replica, and the ASGI messages of its answer on their way back."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.ray.prefix_routing import prefix_key
from serving.server.errors import ReplicaLostError, failure_of
from serving.server.middleware import openai_error, openai_shaped
from serving.server.registry import ModelNotReadyError

ATTEMPTS = 4
"""Replicas that a request is sent to before it fails; each but the last one was lost before its answer began."""
# The replica ends a request at its deadline by itself; only one that found no replica in time is left then.
_GRACE_SECONDS = 2.0


@dataclass(frozen=True)
class ForwardedRequest:
    """An HTTP request with its whole body. `prefix_key` decides on the replica; None is any replica."""

    method: str
    path: str
    raw_path: bytes
    query_string: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    client: tuple[str, int] | None
    body: bytes
    prefix_key: bytes | None = None

    def scope(self) -> Scope:
        """The ASGI scope that a handler sees."""
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.raw_path,
            "root_path": "",
            "query_string": self.query_string,
            "headers": list(self.headers),
            "client": self.client,
            "server": None,
        }


async def answer(app: ASGIApp, request: ForwardedRequest) -> AsyncGenerator[list[Message], None]:
    """The messages that `app` sends, those that wait together in one list.

    Closing the generator ends the handler, as a client does that goes away. Raises what the handler raises.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    body: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]

    async def receive() -> Message:
        if body:
            return body.pop()
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

    async def send(message: Message) -> None:
        messages.put_nowait(message)

    async def run() -> None:
        try:
            await app(request.scope(), receive, send)
        finally:
            messages.put_nowait(None)

    task = asyncio.create_task(run())
    try:
        ended = False
        while not ended:
            batch = [await messages.get()]
            while not messages.empty():
                batch.append(messages.get_nowait())
            ended = batch[-1] is None
            if found := [each for each in batch if each is not None]:
                yield found
        await task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


class Forwarder:
    """ASGI application that has a replica answer.

    `call` sends a request to a replica and gives the messages of its answer; it raises ReplicaLostError if the replica
    is gone. As long as nothing of an answer has left, another replica then gets the request: an answer that is no
    stream leaves when it is complete. `timeout` is in seconds; None waits without end.
    """

    def __init__(
        self,
        call: Callable[[ForwardedRequest], AsyncGenerator[list[Message], None]],
        timeout: float | None,
        characters: int,
    ) -> None:
        self._call, self._timeout, self._characters = call, timeout, characters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = await self._read(scope, receive)
        for left in range(ATTEMPTS - 1, -1, -1):
            answered = _Answer(scope["path"], send)
            try:
                async with contextlib.aclosing(self._call(request)) as batches:
                    await self._relay(batches, answered)
                return
            except ReplicaLostError as error:
                if answered.begun:
                    if not answered.complete:
                        await answered.break_off(error)
                    return
                if not left:
                    raise

    async def _relay(self, batches: AsyncGenerator[list[Message], None], answered: _Answer) -> None:
        try:
            async with asyncio.timeout(None if self._timeout is None else self._timeout + _GRACE_SECONDS):
                first: list[Message] = await anext(batches, [])
        except TimeoutError:
            raise ModelNotReadyError(f"no replica took the request within {self._timeout:g} s; try again") from None
        await answered.take(first)
        async for batch in batches:
            await answered.take(batch)
        if not answered.complete:
            raise ReplicaLostError("the replica ended before its answer did; send the request again")

    async def _read(self, scope: Scope, receive: Receive) -> ForwardedRequest:
        body, more = bytearray(), True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        request_id = scope["state"]["request_id"].encode()
        headers = {name: value for name, value in scope["headers"] if name != b"x-request-id"}
        return ForwardedRequest(
            method=scope["method"],
            path=scope["path"],
            raw_path=scope.get("raw_path") or b"",
            query_string=scope["query_string"],
            headers=(*headers.items(), (b"x-request-id", request_id)),
            client=tuple(scope["client"]) if scope.get("client") else None,
            body=bytes(body),
            prefix_key=prefix_key(headers, bytes(body), self._characters),
        )


class _Answer:
    """What has left for the client of one answer."""

    def __init__(self, path: str, send: Send) -> None:
        self._path, self._send = path, send
        self._held: list[Message] = []
        self._streamed = False
        self.begun = self.complete = False

    async def take(self, batch: list[Message]) -> None:
        for message in batch:
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if pair[0].lower() != b"x-request-id"]
                kinds = [value for name, value in message["headers"] if name.lower() == b"content-type"]
                self._streamed = any(value.startswith(b"text/event-stream") for value in kinds)
                self._held.append(message)
                continue
            self._held.append(message)
            self.complete = not message.get("more_body", False)
            if self._streamed or self.complete:
                self.begun = True
                for each in self._held:
                    await self._send(each)
                self._held.clear()

    async def break_off(self, error: ReplicaLostError) -> None:
        """End a stream that has begun with an event that says why."""
        failure = failure_of(error)
        if openai_shaped(self._path):
            event = b"data: " + json.dumps({"error": openai_error(failure)}).encode() + b"\n\ndata: [DONE]\n\n"
        else:
            event = b"data: " + json.dumps({"error": failure.message}).encode() + b"\n\n"
        await self._send({"type": "http.response.body", "body": event, "more_body": False})
