"""HTTP/1.1 of uvicorn with limits on what comes before a body, where no handler can set any.

httptools joins the parts of a header as they come, so one header without end takes memory, and the loop's time with the
square of its length; and a connection that never sends its first line would be held for ever.
"""

from __future__ import annotations

import asyncio
import json

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.server.errors import INVALID

MAX_HEAD = 65_536
"""Bytes of a request's first line and headers; what comes in one read with them is not counted."""
HEAD_SECONDS = 30.0
"""For them to come in."""


class LimitedProtocol(HttpToolsProtocol):
    """One connection."""

    _pending = 0
    """Bytes since a head, a piece of a body or a message was complete."""
    _advanced = False
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._advanced = False
        super().data_received(data)
        self._pending = 0 if self._advanced else self._pending + len(data)
        if self._pending > MAX_HEAD:
            self._refuse(431, "Request Header Fields Too Large", f"the request's head has more than {MAX_HEAD} bytes")

    def on_message_begin(self) -> None:
        self._wait_for_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._advanced = True
        self._stop_waiting()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._advanced = True
        super().on_body(body)

    def on_message_complete(self) -> None:
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
        """Say so, unless nothing came or an answer is under way here, and close the connection."""
        if self.transport.is_closing():
            return
        if self._pending and (self.cycle is None or self.cycle.response_complete):
            error = {"message": sentence, "type": INVALID.openai_type, "param": None, "code": None}
            body = json.dumps({"error": error}).encode()
            head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()
