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

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.engine.api import DrainingError
from serving.server.errors import INVALID, BodyTimeoutError, BodyTooLargeError, ClientGoneError, Failure, failure_of
from serving.server.playground import PATHS as PLAYGROUND_PATHS
from serving.server.state import Server

OPEN_PATHS = (
    "/health/live",
    "/health/ready",
    "/v2/health/live",
    "/v2/health/ready",
    "/metrics",
    *PLAYGROUND_PATHS,
)
"""What needs no key, so that probes and scrapers need none, and the page can ask for one; no prompt, no text."""
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}\Z")
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
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            self._admit(scope, headers)
            await self._app(scope, _guarded(receive, headers, self._server), sending)
        except ClientGoneError:
            status = 499
        except Exception as error:
            failure = failure_of(error)
            if failure.internal:
                log.error("a request failed", exc_info=error, extra={"request_id": state["request_id"]})
            if not status:
                await error_response(failure, scope["path"])(scope, receive, sending)
            else:  # Left unfinished, so that the client sees a broken answer and not a short one.
                status = 500
        finally:
            self._note(scope, state, status or 499, time.perf_counter() - began)

    def _admit(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Refuse whoever may not ask, or may not ask now."""
        if scope["path"] in OPEN_PATHS:
            return
        authorization = headers.get(b"authorization")
        caller = self._server.keys.check(None if authorization is None else authorization.decode("latin-1"))
        self._server.limiter.take(caller or caller_address(scope))
        if self._server.draining and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            raise DrainingError("the server is shutting down; ask another one or try again")

    def _note(self, scope: Scope, state: dict[str, Any], status: int, seconds: float) -> None:
        route = scope.get("route")
        path = getattr(route, "path", "") or "unmatched"
        self._server.metrics.on_http(scope["method"], path, status, seconds)
        access.log(
            logging.DEBUG if scope["path"] in OPEN_PATHS and status < 400 else logging.INFO,
            "%s %s %d",
            scope["method"],
            scope["path"],
            status,
            extra={
                "request_id": state["request_id"],
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": round(seconds, 6),
                "client": caller_address(scope),
                **state.get("log", {}),
            },
        )


def _guarded(receive: Receive, headers: dict[bytes, bytes], server: Server) -> Receive:
    """`receive` that refuses a body which is too long or too slow. What comes after the body is not limited."""
    limit = server.settings.max_body_bytes
    too_large = f"the body has more than {limit} bytes"
    declared = headers.get(b"content-length", b"")
    deadline = asyncio.get_running_loop().time() + server.settings.body_timeout
    size, complete = 0, False

    async def guarded() -> Message:
        nonlocal size, complete
        if complete:
            return await receive()
        if declared.isdigit() and int(declared) > limit:
            raise BodyTooLargeError(too_large)
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise BodyTimeoutError("the body did not come in time; send it again") from None
        if message["type"] == "http.disconnect":
            raise ClientGoneError("the client went away before its body was complete")
        size += len(message.get("body", b""))
        if size > limit:
            raise BodyTooLargeError(too_large)
        complete = not message.get("more_body", False)
        return message

    return guarded


def caller_address(scope: Mapping[str, Any]) -> str:
    """Whence a request comes; an IPv4 address as itself, also where the listening socket takes both kinds."""
    client = scope.get("client")
    return client[0].removeprefix("::ffff:") if client else ""


def openai_shaped(path: str) -> bool:
    """Whether errors on `path` look as OpenAI's do; TensorFlow Serving and Open Inference say {"error": "..."}."""
    apart = (":", "/versions/", "/labels/")
    return not (path.startswith("/v2") or path.endswith("/metadata") or any(part in path for part in apart))


def openai_error(failure: Failure) -> dict[str, Any]:
    """`failure` as the value of "error" in OpenAI's form."""
    kind = failure.kind
    return {"message": failure.message, "type": kind.openai_type, "param": failure.param, "code": kind.openai_code}


def error_response(failure: Failure, path: str) -> Response:
    """`failure` as JSON, in the form of the protocol that `path` belongs to."""
    body: dict[str, Any] = {"error": failure.message}
    if openai_shaped(path):
        body["error"] = openai_error(failure)
    headers: dict[str, str] = {}
    if failure.retry_after is not None:
        headers["Retry-After"] = str(failure.retry_after)
    if failure.kind.status == 415:
        headers["Accept-Encoding"] = "gzip, deflate"
    if failure.kind.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body, failure.kind.status, headers)


async def on_http_exception(request: Any, error: Exception) -> Response:
    """Starlette's own refusals, an unknown path or method, in the form of the rest."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    sentences = {404: f"there is nothing at {path}", 405: f"{path} does not take {request.method}"}
    kind = replace(INVALID, status=error.status_code)
    response = error_response(Failure(kind, sentences.get(error.status_code, error.detail)), path)
    response.headers.update(error.headers or {})
    return response
