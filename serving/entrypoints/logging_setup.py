"""Logs of the server on standard error: a line of text or of JSON for each event, with the request's id."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any, Literal

Format = Literal["text", "json"]
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}


_UNCLEAR = re.compile(r"[\s\"=]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, the event's further fields, and a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """The same for people: time, level, message, then name=value; control characters in them are written out.

    A path that a client asks for may hold orders to a terminal.
    """

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).strftime("%H:%M:%S.%f")[:-3]
        message = record.getMessage()
        beside = "".join(
            f" {name}={_shown(value)}"
            for name, value in _extra(record).items()
            if name not in ("method", "path", "status")
        )
        line = f"{time} {record.levelname.lower():<7} {_CONTROL.sub(_written_out, message + beside)}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _shown(value: Any) -> Any:
    """Text in quotes where it could be taken for another name and its value."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) and _UNCLEAR.search(value) else value


def _written_out(character: re.Match[str]) -> str:
    return "\\n" if character[0] == "\n" else f"\\x{ord(character[0]):02x}"


class _StandardError(logging.Handler):
    """Writes lines to whatever standard error is now. One that is closed, full or has no reader stops no request."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record) + "\n"
        except Exception:
            self.handleError(record)
            return
        if sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(line)
                sys.stderr.flush()


def configure(form: Format, access: bool = True) -> None:
    """Send the server's logs to standard error; without `access`, not a line for each request."""
    handler = _StandardError()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    for name, level in (("gpt2_bundle", logging.INFO), ("serving", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
    logging.getLogger("gpt2_bundle.access").setLevel(logging.INFO if access else logging.WARNING)
