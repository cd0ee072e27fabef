"""What happens to every request before and after its handler: an id, admission, limits, errors, log and count."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.engine.api import DrainingError
from serving.errors import cut
from serving.server.auth import CALLER
from serving.server.callers import MODEL_PATH, is_openai_client
from serving.server.errors import (
    INVALID,
    BodiesFullError,
    BodyTimeoutError,
    BodyTooLargeError,
    ClientGoneError,
    Failure,
    UnauthenticatedError,
    failure_of,
)
from serving.server.playground import PATHS as PLAYGROUND_PATHS
from serving.server.state import Server

OPEN_PATHS = (
    "/health",
    "/ping",
    "/version",
    "/health/live",
    "/health/ready",
    "/v2/health/live",
    "/v2/health/ready",
    "/metrics",
    *PLAYGROUND_PATHS,
)
"""What needs no key, so that probes and scrapers need none, and the page can ask for one; no prompt, no text."""
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}\Z")
_ADDRESS = re.compile(r"[A-Za-z0-9.:%_-]{0,64}\Z")
_LOGGED_PATH = 1024
"""Characters of a path that the log has."""
log = logging.getLogger("gpt2_bundle.server")
access = logging.getLogger("gpt2_bundle.access")


class Gate:
    """ASGI middleware around every route."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self._app, self._server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        headers: dict[bytes, bytes] = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"")
        if not REQUEST_ID.match(request_id):
            request_id = uuid.uuid4().hex.encode()
        state = scope.setdefault("state", {})
        state["request_id"] = request_id.decode()
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                body.forget()
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        body = _Body(receive, headers, self._server)
        try:
            CALLER.set(self._admit(scope, headers))
            await self._app(scope, body.receive, sending)
        except ClientGoneError:
            status = 499
        except Exception as error:
            failure = failure_of(error)
            _remember(state, failure)
            if failure.internal:
                log.error("a request failed", exc_info=error, extra={"request_id": state["request_id"]})
            if not status:
                await error_response(failure, scope["path"], Headers(scope=scope))(scope, receive, sending)
            else:  # Left unfinished, so that the client sees a broken answer and not a short one.
                status = 500
        finally:
            body.forget()
            self._note(scope, state, status or 499, time.perf_counter() - began)

    def _admit(self, scope: Scope, headers: dict[bytes, bytes]) -> str:
        """Refuse callers without a valid key or over the rate limit; return the digest of the key, "" without keys."""
        if scope["path"] in OPEN_PATHS:
            return ""
        authorization = headers.get(b"authorization")
        try:
            caller = self._server.keys.check(None if authorization is None else authorization.decode("latin-1"))
        except UnauthenticatedError:
            self._server.wrong_keys.take(caller_address(scope))
            raise
        self._server.limiter.take(caller or caller_address(scope))
        if self._server.draining and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            raise DrainingError("the server is shutting down; ask another one or try again")
        return caller or ""

    def _note(self, scope: Scope, state: dict[str, Any], status: int, seconds: float) -> None:
        route = scope.get("route")
        path = getattr(route, "path", "") or "unmatched"
        self._server.metrics.on_http(scope["method"], path, status, seconds)
        access.log(
            logging.DEBUG if scope["path"] in OPEN_PATHS and status < 400 else logging.INFO,
            "%s %s %d",
            scope["method"],
            quote(scope["path"][:_LOGGED_PATH]),
            status,
            extra={
                "request_id": state["request_id"],
                "method": scope["method"],
                "path": scope["path"][:_LOGGED_PATH],
                "status": status,
                "seconds": round(seconds, 6),
                "client": caller_address(scope),
                **state.get("log", {}),
            },
        )


def _remember(state: dict[str, Any], failure: Failure) -> None:
    """Have the access log say why a request was refused."""
    state["log"] = {**state.get("log", {}), "reason": failure.message}


class _Body:
    """A request's body as it comes: refused if it is too long or too slow, or where all bodies together are too long.

    What comes after the body is not limited. Its bytes count until `forget`, when an answer begins.
    """

    def __init__(self, receive: Receive, headers: dict[bytes, bytes], server: Server) -> None:
        self._receive, self._server = receive, server
        self._declared = headers.get(b"content-length", b"")
        self._deadline = asyncio.get_running_loop().time() + server.settings.body_timeout
        self._size, self._counted, self._complete = 0, 0, False

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        limit = self._server.settings.max_body_bytes
        if self._declared.isdigit() and (len(self._declared) > 18 or int(self._declared) > limit):
            raise BodyTooLargeError(f"the body has more than {limit} bytes")
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise BodyTimeoutError("the body did not come in time; send it again") from None
        if message["type"] == "http.disconnect":
            raise ClientGoneError("the client went away before its body was complete")
        self._count(len(message.get("body", b"")))
        if self._size > limit:
            raise BodyTooLargeError(f"the body has more than {limit} bytes")
        self._complete = not message.get("more_body", False)
        return message

    def _count(self, size: int) -> None:
        self._size += size
        self._counted += size
        self._server.body_bytes += size
        if self._server.body_bytes > self._server.settings.max_bodies_bytes:
            raise BodiesFullError("too many bodies are coming in at once; try again")

    def forget(self) -> None:
        """Count no more; may be called more than once."""
        self._server.body_bytes -= self._counted
        self._counted = 0


def caller_address(scope: Mapping[str, Any]) -> str:
    """Whence a request comes; an IPv4 address as itself, also where the listening socket takes both kinds."""
    client = scope.get("client")
    address = client[0].removeprefix("::ffff:") if client else ""
    # A proxy may forward any text as an address, and the log has a line for each.
    return address if _ADDRESS.match(address) else "unknown"


def openai_shaped(path: str, caller: Mapping[str, str] | None = None) -> bool:
    """Whether errors on `path` look as OpenAI's do; TensorFlow Serving and Open Inference say {"error": "..."}.

    `caller` is the headers of a request, which decide where OpenAI and TensorFlow Serving share a path.
    """
    if caller is not None and MODEL_PATH.match(path):
        return is_openai_client(caller)
    apart = (":", "/versions/", "/labels/")
    return not (path.startswith("/v2") or path.endswith("/metadata") or any(part in path for part in apart))


def openai_error(failure: Failure) -> dict[str, Any]:
    """`failure` as the value of "error" in OpenAI's form."""
    kind = failure.kind
    return {"message": failure.message, "type": kind.openai_type, "param": failure.param, "code": kind.openai_code}


def error_response(failure: Failure, path: str, caller: Mapping[str, str]) -> Response:
    """`failure` as JSON, in the form of the protocol that `path` and the `caller`'s headers belong to."""
    body: dict[str, Any] = {"error": failure.message}
    if openai_shaped(path, caller):
        body["error"] = openai_error(failure)
    headers: dict[str, str] = {}
    if failure.retry_after is not None:
        headers["Retry-After"] = str(failure.retry_after)
    if failure.kind.status == 415:
        headers["Accept-Encoding"] = "gzip, deflate"
    if failure.kind.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body, failure.kind.status, headers)


_MISTAKEN = (
    ("/v1/v1/", "/v1/"),
    ("/completions", "/v1/completions"),
    ("/chat/completions", "/v1/chat/completions"),
    ("/models", "/v1/models"),
)


def _hint(path: str) -> str:
    """Where a client with a wrong base URL wanted to go."""
    for wrong, right in _MISTAKEN:
        if path == wrong or (wrong.endswith("/") and path.startswith(wrong)):
            return f"; ask {cut(right + path[len(wrong) :])}, with the base URL of this server and /v1 once"
    return ""


async def on_http_exception(request: Any, error: Exception) -> Response:
    """Starlette's own refusals, an unknown path or method, in the form of the rest."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    sentences = {
        404: f"there is nothing at {cut(path)}{_hint(path)}",
        405: f"{cut(path)} does not take {request.method}",
    }
    kind = replace(INVALID, status=error.status_code)
    failure = Failure(kind, sentences.get(error.status_code, error.detail))
    _remember(request.scope["state"], failure)
    response = error_response(failure, path, request.headers)
    response.headers.update(error.headers or {})
    return response
