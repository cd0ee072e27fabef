"""Server-sent events as a response that ends its generation when the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

PING = b": ping\n\n"
"""A comment, which clients of server-sent events ignore."""


class EventStream(StreamingResponse):
    """Sends what its iterator gives, and pings until its first chunk, so that no proxy takes it for dead.

    `Generation` watches the client, so a chunk needs no further check.
    """

    def __init__(self, chunks: AsyncGenerator[bytes, None], ping_seconds: float = 0.0) -> None:
        """`ping_seconds` is between two pings; 0 sends none."""
        if ping_seconds:
            chunks = _with_pings(chunks, ping_seconds)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(chunks, media_type="text/event-stream", headers=headers)
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._chunks):
            await self.stream_response(send)


async def _with_pings(chunks: AsyncGenerator[bytes, None], seconds: float) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(chunks):
        first = asyncio.ensure_future(anext(chunks, b""))
        try:
            while not (await asyncio.wait((first,), timeout=seconds))[0]:
                yield PING
        finally:
            if not first.done():
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)
        yield first.result()
        async for chunk in chunks:
            yield chunk
