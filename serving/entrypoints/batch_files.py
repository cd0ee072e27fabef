"""The two files of an offline batch: OpenAI's request lines, and the answers, which tell what is done after a kill."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from serving.errors import GPT2BundleError, InputError, cut

MAX_ID_LENGTH = 1024
"""Characters of a custom_id."""
_LINE_EXTRA = 65_536
"""Bytes of a line around its body."""
_BLOCK = 1 << 20


class LineError(InputError):
    """A line is not a request; `code` is one word of what is wrong, `custom_id` the line's, if it has one."""

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code, self.custom_id = code, custom_id


@dataclass(frozen=True)
class BatchRequest:
    """One line: a body to post to `url`."""

    custom_id: str
    url: str
    body: bytes


def request_lines(path: Path, max_body: int) -> Iterator[tuple[int, bytes | None]]:
    """The lines of `path` that are not blank, each with its number from 1; None for one that is too long.

    A line is too long where a body of `max_body` bytes cannot make it so. At most one line is in memory.
    """
    most = max_body + _LINE_EXTRA
    with path.open("rb") as file:
        number = 0
        while line := file.readline(most + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            too_long = len(line) > most
            while too_long and line and not line.endswith(b"\n"):
                line = file.readline(_BLOCK)
            if too_long:
                yield number, None
            elif line.strip():
                yield number, line


def parse_line(line: bytes) -> BatchRequest:
    """A line as a request. Raises LineError."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LineError("invalid_json", f"the line is not JSON: {cut(str(error))}") from None
    if not isinstance(value, dict):
        raise LineError("invalid_line", "the line must be a JSON object with custom_id, method, url and body")
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_ID_LENGTH:
        raise LineError("invalid_custom_id", f"custom_id must be a string of 1 to {MAX_ID_LENGTH} characters")
    if value.get("method") != "POST":
        raise LineError("invalid_method", "method must be 'POST'", custom_id)
    url, body = value.get("url"), value.get("body")
    if not isinstance(url, str) or not url.startswith("/") or len(url) > MAX_ID_LENGTH:
        raise LineError("invalid_url", "url must be a path of the server, such as '/v1/completions'", custom_id)
    if not isinstance(body, dict):
        raise LineError("invalid_body", "body must be a JSON object", custom_id)
    if body.get("stream"):
        raise LineError("invalid_body", "a batch has no streams; leave out 'stream'", custom_id)
    return BatchRequest(custom_id, url, json.dumps(body).encode())


class AnswerFile:
    """The answers so far, and where further ones go; one process at a time.

    Answers are appended, each by one write. A process that is killed leaves at most one line without an end, which the
    next one cuts off, and answers that request again.
    """

    def __init__(self, path: Path) -> None:
        """Raises InputError for a file that is something else, GPT2BundleError if another process writes to it."""
        self._path, self._new = path, not path.exists()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        self._size = 0
        self.answered = self.failed = 0
        """Of all lines in the file, and those among them that are errors."""
        # Whether the input's line of this identity was seen by this process, for all that have an answer or had a turn.
        self._seen: dict[bytes, bool] = {}
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise InputError(f"{path}: not a plain file; name one that answers can be appended to")
            _lock(self._file, path)
            self._read()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            os.fsync(self._file)
            # Whatever failed before the first answer leaves no file behind.
            if error is not None and self._new and os.fstat(self._file).st_size == 0:
                self._path.unlink(missing_ok=True)
        os.close(self._file)

    def has_id(self, custom_id: str) -> bool:
        """Whether the request has its answer already. Raises LineError for an id that an earlier line has."""
        identity = _identity(custom_id)
        seen = self._seen.get(identity)
        if seen:
            raise LineError("duplicate_custom_id", "an earlier line has this custom_id; give each its own", custom_id)
        self._seen[identity] = True
        return seen is not None

    def has_line(self, number: int) -> bool:
        """Whether the wrong line of this number has its answer already."""
        return _identity(number) in self._seen

    def add_answer(self, custom_id: str, status: int, request_id: str, body: bytes) -> None:
        """Append what the server answered; `body` is JSON without line breaks."""
        head = json.dumps({"id": _new_id(), "custom_id": custom_id})[:-1]
        answer = json.dumps({"status_code": status, "request_id": request_id})[:-1]
        line = f'{head}, "response": {answer}, "body": '.encode() + body + b'}, "error": null}\n'
        self._append(line, failed=status >= 400)

    def add_error(self, number: int, error: LineError) -> None:
        """Append what is wrong with line `number` of the input."""
        detail = {"code": error.code, "message": f"line {number}: {error}", "line": number}
        line = {"id": _new_id(), "custom_id": error.custom_id, "response": None, "error": detail}
        self._append(json.dumps(line).encode() + b"\n", failed=True)

    def _append(self, line: bytes, failed: bool) -> None:
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:  # Such as a full disk: half an answer is of no use.
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(line)
        self.answered += 1
        self.failed += failed

    def _read(self) -> None:
        """Take note of what is answered, and cut off a last line that has no end."""
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    os.ftruncate(self._file, self._size)
                    break
                self._size += len(line)
                self._note(number, line)

    def _note(self, number: int, line: bytes) -> None:
        identity, failed = _answered(line)
        if identity is None:
            raise InputError(
                f"{self._path}: line {number} is not an answer of a batch; name another file, or move this one away"
            )
        self._seen[identity] = False
        self.answered += 1
        self.failed += failed


def _answered(line: bytes) -> tuple[bytes | None, bool]:
    """Which request a line of answers is for, None if it is none, and whether it is an error."""
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None, False
    if not isinstance(value, dict):
        return None, False
    custom_id, response, error = value.get("custom_id"), value.get("response"), value.get("error")
    if isinstance(error, dict) and type(error.get("line")) is int:
        return _identity(error["line"]), True
    if isinstance(custom_id, str) and isinstance(response, dict) and type(response.get("status_code")) is int:
        return _identity(custom_id), response["status_code"] >= 400
    return None, False


def _identity(key: str | int) -> bytes:
    """16 bytes for a custom_id, or for the number of a line: a batch may have millions."""
    return hashlib.blake2b(repr((type(key) is int, key)).encode("ascii", "backslashreplace"), digest_size=16).digest()


def _new_id() -> str:
    return f"batch_req_{secrets.token_hex(12)}"


def _lock(file: int, path: Path) -> None:
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows has none; there, two at once are the caller's care.
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise GPT2BundleError(f"{path}: another process writes to it; wait for its end, or name another file") from None
