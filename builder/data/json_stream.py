"""The values of a JSON file of any size, one at a time: the elements of a list, or values one after the other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serving.errors import InputError

_BLANK = re.compile(r"[ \t\n\r]*")
# An error so near to the end of what was read may mean that a word, a number or an escape continues.
_NEAR_END = 16


def read_json_values(texts: Iterator[str], path: Path) -> Iterator[Any]:
    """Yield the values of a JSON text that comes in chunks: of a list its elements, else each value.

    Memory holds one value and what was read with it. Raises InputError, with the line, for what is not JSON.
    """
    buffer = _Buffer(texts, path)
    if buffer.peek() != "[":
        while buffer.peek():
            yield buffer.value()
        return
    buffer.place += 1
    if buffer.peek() == "]":
        buffer.place += 1
    else:
        while True:
            yield buffer.value()
            separator = buffer.peek()
            buffer.place += 1
            if separator == "]":
                break
            if separator != ",":
                raise buffer.error("a comma or the end of the list is missing", -1)
    if buffer.peek():
        raise buffer.error("text after the end of the list")


class _Buffer:
    """What was read and not yet used up begins at `place` in the text."""

    def __init__(self, texts: Iterator[str], path: Path) -> None:
        self._texts, self._path = texts, path
        self._text, self._lines = "", 1
        self._decoder = json.JSONDecoder()
        self.place = 0

    def peek(self) -> str:
        """Skip blanks and return the character there, empty at the end of the file."""
        while True:
            self.place = _BLANK.match(self._text, self.place).end()  # type: ignore[union-attr]
            if self.place < len(self._text) or not self._read():
                return self._text[self.place : self.place + 1]

    def value(self) -> Any:
        """Return the value that begins there, and continue after it."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self.place)
            except RecursionError:
                raise self.error("nested too deeply") from None
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _NEAR_END
                if not cut or not self._read():
                    raise self.error(error.msg, error.pos - self.place) from None
                continue
            except ValueError as error:  # A number of too many digits.
                raise self.error(str(error)) from None
            if end < len(self._text) or not self._read():
                self.place = end
                return value

    def error(self, reason: str, offset: int = 0) -> InputError:
        """The error for what stands `offset` characters on."""
        line = self._lines + self._text.count("\n", 0, self.place + offset)
        return InputError(f"{self._path}, line {line}: not valid JSON ({reason}); mend the file or write it again")

    def _read(self) -> bool:
        """Read as much again as there is, so that a long value is not looked at too often; false at the end."""
        parts, wanted = [self._text[self.place :]], len(self._text) - self.place
        self._lines += self._text.count("\n", 0, self.place)
        self.place, read = 0, 0
        for text in self._texts:
            parts.append(text)
            read += len(text)
            if read >= wanted:
                break
        self._text = "".join(parts)
        return read > 0
