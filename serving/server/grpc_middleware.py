"""What happens to every gRPC call before and after its handler: an id, admission, errors, log and count."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any
from urllib.parse import unquote

from serving.server.errors import failure_of
from serving.server.middleware import REQUEST_ID, access, log
from serving.server.state import Server

Timeout = Callable[[Any], float | None]
_KEY = "x-request-id"
_request_id: ContextVar[str] = ContextVar("request_id", default="")


def request_id() -> str:
    """The id of the call that this task answers: what the caller named it by `x-request-id`, or a name made here."""
    return _request_id.get()


def headers_of(context: Any) -> dict[str, str]:
    """The call's metadata that is text."""
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


def client_of(context: Any) -> str:
    """Whence a call comes, as HTTP has it; gRPC writes "ipv4:127.0.0.1:5" and "ipv6:%5B::1%5D:5"."""
    address: str = unquote(context.peer()).partition(":")[2].rpartition(":")[0]
    return address.strip("[]").removeprefix("::ffff:")


def _named(context: Any) -> str:
    name = headers_of(context).get(_KEY, "")
    return name if REQUEST_ID.match(name.encode()) else uuid.uuid4().hex


def unary(
    server: Server, method: str, handler: Any, asked: Any, admit: Callable[[Any], None] | None
) -> Callable[..., Awaitable[Any]]:
    """`handler` of a message `asked`, which is read here, since what cannot be read is the caller's fault."""
    from serving.protobuf.tables import read_message

    async def read(data: bytes, context: Any) -> Any:
        request = asked()
        read_message(data, request)
        return await handler(request, context)

    return guarded(server, method, read, admit)


def guarded(
    server: Server, method: str, handler: Callable[..., Awaitable[Any]], admit: Callable[[Any], None] | None
) -> Callable[..., Awaitable[Any]]:
    """`handler` of `method` ("service/name") after `admit`, its errors as gRPC statuses by the one table.

    Each call is counted and has a line in the access log; a probe, which has no `admit`, only where it fails.
    """
    import grpc

    async def call(request: Any, context: Any) -> Any:
        began, code = time.perf_counter(), "CANCELLED"
        name = _named(context)
        _request_id.set(name)
        context.set_trailing_metadata(((_KEY, name),))
        try:
            if admit is not None:
                admit(context)
            answer = await handler(request, context)
            code = "OK"
            return answer
        except Exception as error:
            failure = failure_of(error)
            code = failure.kind.grpc_code
            if failure.internal:
                log.error("a call failed", exc_info=error, extra={"request_id": name})
            if failure.retry_after is not None:
                pushback = ("grpc-retry-pushback-ms", str(1000 * failure.retry_after))
                context.set_trailing_metadata(((_KEY, name), pushback))
            await context.abort(grpc.StatusCode[code], failure.message)
        finally:
            _note(server, method, code, time.perf_counter() - began, name, client_of(context), probe=admit is None)

    return call


def _note(server: Server, method: str, code: str, seconds: float, name: str, client: str, probe: bool) -> None:
    server.metrics.on_grpc(method, code)
    beside = {"request_id": name, "method": method, "code": code, "seconds": round(seconds, 6), "client": client}
    access.log(logging.DEBUG if probe and code == "OK" else logging.INFO, "gRPC %s %s", method, code, extra=beside)
