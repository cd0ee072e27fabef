"""What the handlers of several HTTP protocols do: make arrays of JSON's numbers, and stop when the client goes."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request

from serving.server.errors import ClientGoneError

_T = TypeVar("_T")


def number_array(values: list[Any], kind: Any) -> NDArray[Any] | None:
    """JSON's numbers as an array of `kind`, all at once; None where one is of another type or too large for it."""
    integers = issubclass(kind, np.integer)
    if not set(map(type, values)) <= ({int} if integers else {int, float}):
        return None
    try:
        array = np.array(values, np.int64 if integers else np.float64)
    except OverflowError:
        return None
    if not integers:
        with np.errstate(over="ignore"):  # What is beyond `kind` becomes infinite.
            return array.astype(kind)
    limits = np.iinfo(kind)
    fits = not array.size or (array.min() >= limits.min and array.max() <= limits.max)
    return array.astype(kind) if fits else None


async def while_connected(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of `work`, which is cancelled when the client of `request`, whose body was read, goes away.

    Raises ClientGoneError then.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError("the client went away before its answer was complete")
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
