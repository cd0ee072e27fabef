"""API keys and rate limits, shared by HTTP and gRPC."""

from __future__ import annotations

import hashlib
import hmac
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from pathlib import Path

from serving.errors import InputError
from serving.server.errors import RateLimitError, UnauthenticatedError

KEYS_VARIABLE = "GPT2_BUNDLE_API_KEYS"
MIN_KEY_LENGTH = 8
CALLER: ContextVar[str] = ContextVar("caller", default="")
"""Whose call a task answers: a digest of its key, "" where there are no keys. No caller sees what another one asked."""
_REMEMBERED = 10_000


def read_keys(file: Path | None, variable: str | None, given: Iterable[str] = ()) -> tuple[str, ...]:
    """Keys from `file`, one a line, '#' beginning a comment, from `variable`, with commas between, and those `given`.

    Raises InputError for a file that cannot be read or has no key, and for a key that is too short or not plain ASCII.
    """
    lines: list[str] = []
    if file is not None:
        try:
            lines = [line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise InputError(f"the API key file {file} cannot be read: {reason}") from None
        if not any(lines):
            raise InputError(f"the API key file {file} has no key; write one on each line")
    lines += [*(variable or "").split(","), *given]
    keys = tuple(dict.fromkeys(key.strip() for key in lines if key.strip()))
    for number, key in enumerate(keys, 1):
        if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
            raise InputError(
                f"API key {number} is wrong: it must be {MIN_KEY_LENGTH} or more printable ASCII characters, no spaces"
            )
    return keys


class Keys:
    """The known API keys, of which only digests are kept."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def check(self, authorization: str | None) -> str | None:
        """The caller's name for limits: a digest of the key in `authorization` ("Bearer KEY"); None without any keys.

        Raises UnauthenticatedError. Every known key is compared in full, so the time says nothing about any of them.
        """
        if not self._digests:
            return None
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise UnauthenticatedError("this server needs an API key; send the header 'Authorization: Bearer KEY'")
        digest = _digest(key.strip())
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(found):
            raise UnauthenticatedError("the API key is not known here; check the header 'Authorization: Bearer KEY'")
        return digest.hex()[:16]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


class RateLimiter:
    """A bucket of tokens for each caller (Turner, 1986): a burst of up to a minute's requests, refilled evenly.

    The least recently seen callers beyond 10,000 are forgotten, which can only favour them.
    """

    def __init__(self, per_minute: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = None if per_minute is None else per_minute / 60
        self._size = max(1.0, per_minute or 0)
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, caller: str) -> None:
        """Count one request of `caller`. Raises RateLimitError if it has none left."""
        if self._rate is None:
            return
        with self._lock:
            now = self._clock()
            left, before = self._buckets.pop(caller, (self._size, now))
            left = min(self._size, left + (now - before) * self._rate)
            allowed = left >= 1
            self._buckets[caller] = (left - 1 if allowed else left, now)
            if len(self._buckets) > _REMEMBERED:
                self._buckets.popitem(last=False)
        if not allowed:
            seconds = max(1, math.ceil((1 - left) / self._rate))
            raise RateLimitError(f"too many requests; try again in {seconds} s", seconds)
