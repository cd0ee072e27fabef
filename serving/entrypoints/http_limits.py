"""uvicorn's HTTP with limits on what comes before a body, where no handler can set any, and no chunks in HTTP/1.0.

httptools joins the parts of a header as they come, so one header without end takes memory, and the loop's time with the
square of its length; and a connection that never sends its first line would be held for ever.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from serving.server.errors import INVALID

MAX_HEAD = 65_536
"""Bytes of a request's first line and headers; what comes in one read with them is not counted."""
HEAD_SECONDS = 30.0
"""For them to come in."""


class LimitedProtocol(HttpToolsProtocol):
    """One connection."""

    _pending = 0
    """Bytes since a head, a part of a body or a message was complete."""
    _advanced = False
    _again = b""
    """The head of a request to be read again."""
    _timer: asyncio.TimerHandle | None = None

    max_connections = 1000
    _problem = ""
    """What is wrong with a head that the parser itself takes."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._answer(503, "Service Unavailable", "too many connections are open here; try again")
            return
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._advanced = False
        self._unset_keepalive_if_required()
        try:
            self._parse(memoryview(data))
        except httptools.HttpParserError:
            self.logger.warning("refused what cannot be read as HTTP/1.1")
            self._answer(400, "Bad Request", self._problem or "what came cannot be read as HTTP/1.1")
            return
        self._pending = 0 if self._advanced else self._pending + len(data)
        if self._pending > MAX_HEAD:
            self._refuse(431, "Request Header Fields Too Large", f"the request's head has more than {MAX_HEAD} bytes")

    def _parse(self, data: memoryview) -> None:
        """Feed the parser, again without the upgrade header where requests ask for another protocol.

        The parser takes what follows their heads for that protocol, which would lose the body that Java's HTTP client
        sends though it asks for HTTP/2.
        """
        while len(data):
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                head, self._again = self._again, b""
                if not head:
                    return
                data = data[upgrade.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # As uvicorn does.
                self.parser.feed_data(head)

    def on_message_begin(self) -> None:
        self._wait_for_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._problem = _head_problem(self.parser.get_http_version(), self.headers)
        if self._problem:
            raise ValueError(self._problem)
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            first = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
            rest = [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
            self._again = b"\r\n".join([first, *rest, b"", b""])
            return
        self._advanced = True
        self._stop_waiting()
        super().on_headers_complete()
        if self.scope["http_version"] in ("0.9", "1.0"):
            self.cycle.send = _unchunked(self.cycle)  # type: ignore[method-assign, assignment]

    def on_body(self, body: bytes) -> None:
        self._advanced = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._again:
            self._advanced = True
            super().on_message_complete()

    def _wait_for_head(self) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(
            HEAD_SECONDS, self._refuse, 408, "Request Timeout", "the request's head did not come in time; send it again"
        )

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: int, reason: str, sentence: str) -> None:
        """Say so, unless nothing came, and close the connection."""
        if self._pending:
            self._answer(status, reason, sentence)
        elif not self.transport.is_closing():
            self.transport.close()

    def _answer(self, status: int, reason: str, sentence: str) -> None:
        """Say so, unless an answer is under way here, and close the connection."""
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            if self.cycle is not None:  # Whoever still works on it has nobody to answer.
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            error = {"message": sentence, "type": INVALID.openai_type, "param": None, "code": None}
            body = json.dumps({"error": error}).encode()
            head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()


def limited(most: int) -> type[LimitedProtocol]:
    """The protocol for at most `most` connections at once."""
    return type("Protocol", (LimitedProtocol,), {"max_connections": most})


def _head_problem(version: str, headers: list[tuple[bytes, bytes]]) -> str:
    """What RFC 9112 wants refused with 400 and the parser takes, as a sentence; "" for nothing."""
    hosts = sum(name == b"host" for name, _ in headers)
    if hosts > 1 or (hosts == 0 and version not in ("0.9", "1.0")):
        return f"the request has {hosts} Host headers; send one"
    encodings = [value.strip().lower() for name, value in headers if name == b"transfer-encoding"]
    if encodings and encodings != [b"chunked"]:
        return "the request has a Transfer-Encoding that is not 'chunked'"
    if encodings and any(name == b"content-length" for name, _ in headers):
        return "the request has both Content-Length and Transfer-Encoding; send one"
    return ""


def _unchunked(cycle: RequestResponseCycle) -> Callable[[Any], Awaitable[None]]:
    """`cycle.send` for a client that knows no chunks: a body of unknown length ends with its connection (RFC 9112)."""
    send, sized = cycle.send, True

    async def sending(message: Any) -> None:
        nonlocal sized
        if message["type"] == "http.response.start":
            sized = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if not sized:
                cycle.chunked_encoding = False
        elif not sized:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    return sending
