"""Request bodies: unpacked, and JSON into a pydantic model, or one sentence that names the field."""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from serving.errors import InputError, cut
from serving.server.errors import BodyEncodingError, BodyTooLargeError, FieldError
from serving.server.state import Server

Body = TypeVar("Body", bound="RequestBody")
_Result = TypeVar("_Result")
_LONG_BODY = 65_536
"""Bytes from which on a body is read in another thread, so that streams under way do not wait for it."""
MAX_VALUES = 163_840
"""In one body of JSON: the token ids of 128 prompts that fill a context of 1,024, and a quarter more."""
_MAX_IGNORED = 256
_ignored: set[tuple[type[BaseModel], str]] = set()
"""Unknown fields that the log has."""
log = logging.getLogger("gpt2_bundle.server")
MAX_FIELDS = 256
"""Of one body."""
MAX_ID = 2**31 - 1
_GZIP = 16 + zlib.MAX_WBITS
_WINDOWS = {"gzip": _GZIP, "x-gzip": _GZIP, "deflate": zlib.MAX_WBITS}


class RequestBody(BaseModel):
    """A body whose known fields must have their own type. Unknown ones are logged once each, and ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    @classmethod
    def refuse(cls, fields: Mapping[str, Any]) -> None:
        """Raise FieldError for one of `fields`, as they came, that is understood and not done here."""


async def read_body(request: Request, kind: type[Body]) -> Body:
    """The body of `request` as `kind`. Raises FieldError for what is not JSON or does not fit."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        # Also what keeps other sites' pages from posting here: a browser asks before it sends this type elsewhere.
        raise FieldError("the body must be JSON; send the header 'Content-Type: application/json'", None)
    data = await read_bytes(request)
    return await reading(data, lambda: parse_body(data, kind))


async def reading(data: bytes, work: Callable[[], _Result]) -> _Result:
    """The result of `work`, which reads `data`; long data is read in another thread."""
    return await asyncio.to_thread(work) if len(data) > _LONG_BODY else work()


async def read_bytes(request: Request) -> bytes:
    """The body of `request`, unpacked if it came as gzip or deflate, with the same limit on its size.

    Raises InputError for what cannot be unpacked, BodyEncodingError and BodyTooLargeError.
    """
    data = await request.body()
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding in ("", "identity"):
        return data
    server: Server = request.app.state.server
    # In another thread, as a short body may become a long one.
    return await asyncio.to_thread(_unpacked, data, encoding, server.settings.max_body_bytes)


def _unpacked(data: bytes, encoding: str, most: int) -> bytes:
    if encoding not in _WINDOWS:
        raise BodyEncodingError(f"the body comes as {encoding[:40]!r}; send it as it is, or as gzip or deflate")
    unpacking = zlib.decompressobj(_WINDOWS[encoding])
    try:
        unpacked = unpacking.decompress(data, most + 1)
    except zlib.error:
        raise InputError(f"the body says that it is {encoding}, and cannot be unpacked") from None
    if len(unpacked) > most:
        raise BodyTooLargeError(f"the body has more than {most} bytes when it is unpacked")
    if not unpacking.eof:
        raise InputError(f"the body says that it is {encoding}, and ends too early")
    if unpacking.unused_data:
        raise InputError(f"the body says that it is {encoding}, and continues after its end")
    return unpacked


def parse_body(data: bytes, kind: type[Body]) -> Body:
    """JSON as `kind`. Raises FieldError."""
    fields = parse_object(data)
    kind.refuse(fields)
    if kind.model_config.get("extra") == "ignore":
        for name in fields.keys() - kind.model_fields.keys():
            _say_ignored(kind, name)
    return check_fields(fields, kind)


def _say_ignored(kind: type[BaseModel], name: str) -> None:
    if len(_ignored) < _MAX_IGNORED and (kind, name) not in _ignored:
        _ignored.add((kind, name))
        log.info("the field %r of a %s is not known here, and ignored", cut(name), kind.__name__)


def parse_object(data: bytes) -> dict[str, Any]:
    """`data` as a JSON object. NaN and Infinity are read, as TensorFlow Serving reads them. Raises FieldError."""
    check_values(data)
    try:
        value = from_json(data)
    except ValueError as error:
        raise FieldError(f"the body is not JSON: {error}", None) from None
    if not isinstance(value, dict):
        raise FieldError("the body must be a JSON object", None)
    if len(value) > MAX_FIELDS:
        raise FieldError(f"the body has {len(value)} fields; it may have {MAX_FIELDS}", None)
    return value


def check_values(data: bytes) -> None:
    """Refuse JSON of more than MAX_VALUES values before it is read: a reader holds the interpreter all that while.

    Commas and brackets are counted, those inside texts too. Raises FieldError.
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise FieldError(
            f"the body has more than {MAX_VALUES} values (commas and brackets); send several requests", None
        )


def whole_number(value: Any) -> Any:
    """2.0 as 2, which JSON Schema says it is; anything else as it is."""
    return int(value) if type(value) is float and value.is_integer() else value


def token_ids(value: Any, most: int = MAX_VALUES) -> list[int]:
    """`value` if it is a list of at most `most` token ids; whole numbers may be written as 2.0. Raises ValueError."""
    if not isinstance(value, list):
        raise ValueError("must be a list of token ids")
    if len(value) > most:
        raise ValueError(f"must have at most {most} token ids")
    ids = list(map(whole_number, value)) if float in set(map(type, value)) else value
    if not set(map(type, ids)) <= {int} or (ids and not (min(ids) >= 0 and max(ids) <= MAX_ID)):
        raise ValueError(f"must be a list of token ids, whole numbers from 0 to {MAX_ID}")
    return ids


def check_fields(fields: Mapping[str, Any], kind: type[Body]) -> Body:
    """Values by name as `kind`. Raises FieldError."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _field_error(error) from None


def _field_error(error: ValidationError) -> FieldError:
    # A list ends its validation at its first error (`fail_fast`), so there are few.
    first = error.errors(include_url=False, include_input=False)[0]
    problem = first["msg"].removeprefix("Value error, ")
    problem = problem[:1].lower() + problem[1:]
    place = ".".join(map(str, first["loc"]))[:200]
    if not place:
        return FieldError(f"the body: {problem}", None)
    return FieldError(f"{place}: {problem}", str(first["loc"][0])[:200])
