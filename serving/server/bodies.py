"""Request bodies: JSON into a pydantic model, or one sentence that names the field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request

from serving.server.errors import FieldError

Body = TypeVar("Body", bound=BaseModel)


class RequestBody(BaseModel):
    """A body whose unknown fields are ignored and whose known ones must have their own type."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


async def read_body(request: Request, kind: type[Body]) -> Body:
    """The body of `request` as `kind`. Raises FieldError for what is not JSON or does not fit."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        # Also what keeps other sites' pages from posting here: a browser asks before it sends this type elsewhere.
        raise FieldError("the body must be JSON; send the header 'Content-Type: application/json'", None)
    return parse_body(await request.body(), kind)


def parse_body(data: bytes, kind: type[Body]) -> Body:
    """JSON as `kind`. Raises FieldError."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        again = _with_whole_numbers(data)
        if again is None:
            raise _field_error(error) from None
    try:
        return kind.model_validate_json(again)
    except ValidationError as error:
        raise _field_error(error) from None


def _with_whole_numbers(data: bytes) -> str | None:
    """The JSON text `data` with numbers such as 2.0 as integers, which JSON Schema says they are; None without any."""
    found = False

    def number(text: str) -> int | float:
        nonlocal found
        value = float(text)
        if not value.is_integer():
            return value
        found = True
        return int(value)

    try:
        text = json.dumps(json.loads(data, parse_float=number))
    except (ValueError, RecursionError):
        return None
    return text if found else None


def check_fields(fields: Mapping[str, Any], kind: type[Body]) -> Body:
    """Values by name as `kind`. Raises FieldError."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _field_error(error) from None


def _field_error(error: ValidationError) -> FieldError:
    first = error.errors(include_url=False, include_input=False)[0]
    problem = first["msg"].removeprefix("Value error, ")
    problem = problem[:1].lower() + problem[1:]
    if first["type"] == "json_invalid":
        return FieldError(f"the body is not JSON: {problem.removeprefix('invalid JSON: ')}", None)
    place = ".".join(map(str, first["loc"]))[:200]
    if not place:
        return FieldError(f"the body: {problem}", None)
    return FieldError(f"{place}: {problem}", str(first["loc"][0])[:200])
