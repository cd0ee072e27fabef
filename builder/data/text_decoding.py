"""The text of a file: decompressed by its ending, decoded by its byte-order mark or a named encoding, in chunks."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from serving.errors import InputError, RuntimeMissingError
from serving.support.suggestions import did_you_mean

COMPRESSIONS = (".gz", ".zst")
_CHUNK = 1 << 20
# The longer marks first: that of UTF-32 begins with one of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_COMMON = ("utf-8", "gb18030", "gbk", "big5", "cp1252", "latin-1", "utf-16", "shift_jis", "euc-kr", "koi8-r")


def check_encoding(name: str, where: str) -> None:
    """Raise InputError, naming the recipe key or option `where`, for an encoding that Python does not have."""
    try:
        text = codecs.lookup(name)._is_text_encoding
    except LookupError:
        text = False
    if not text:
        raise InputError(f"{where} is {name!r}, which is not a text encoding{did_you_mean(name, _COMMON)}")


def read_text(path: Path, encoding: str = "utf-8") -> Iterator[str]:
    """Yield the text of a file in chunks of about a million characters.

    A byte-order mark, which is not part of the text, decides the encoding; without one it is `encoding`. Raises
    InputError, with the byte where it has one, for what cannot be decompressed or decoded, and for a zero character,
    which only binary files have.
    """
    decoder: Any = None
    offset, held = 0, b""
    for chunk in chain(filter(None, read_bytes(path)), [b""]):
        data = chunk
        if decoder is None:
            held += chunk
            if chunk and len(held) < 4:
                continue
            data, encoding = held, next((name for mark, name in _MARKS if held.startswith(mark)), encoding)
            decoder = codecs.getincrementaldecoder(encoding)()
        pending = len(decoder.getstate()[0])
        start = offset - pending
        try:
            text = decoder.decode(data, final=not chunk)
        except UnicodeDecodeError as error:
            raise _undecodable(path, encoding, error, start) from None
        except UnicodeError as error:  # UTF-16 and UTF-32 without a mark where one is asked for.
            raise InputError(f"{path}: not {encoding} text ({error}); leave it out") from None
        if "\0" in text:
            place = start + len(text[: text.index("\0")].encode(encoding, "replace"))
            raise _binary(path, place)
        if offset == 0:
            text = text.removeprefix("\ufeff")
        offset += len(data)
        if text:
            yield text


def read_lines(path: Path, encoding: str = "utf-8") -> Iterator[str]:
    """Yield the lines of a file, each with its line end; only a line feed ends one, so JSON and CSV see the rest."""
    parts: list[str] = []
    for text in read_text(path, encoding):
        first, *more = text.split("\n")
        parts.append(first)
        for line in more:
            yield "".join(parts) + "\n"
            parts = [line]
    if last := "".join(parts):
        yield last


def read_bytes(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file, decompressed by its ending, in chunks. Raises InputError for broken compression."""
    with path.open("rb") as file:
        match path.suffix.lower():
            case ".gz":
                yield from _gunzip(path, file)
            case ".zst":
                yield from _unzstd(path, file)
            case _:
                while chunk := file.read(_CHUNK):
                    yield chunk


def _undecodable(path: Path, encoding: str, error: UnicodeDecodeError, start: int) -> InputError:
    zero = error.object.find(b"\0", 0, error.start)
    if zero >= 0:
        return _binary(path, start + zero)
    name = codecs.lookup(encoding).name.upper()
    place = f"byte {start + error.start} is {error.object[error.start]:#04x}"
    return InputError(
        f"{path}: not {name} text ({place}); name its encoding in corpus.encoding, such as gb18030 or cp1252, or leave "
        "it out"
    )


def _binary(path: Path, place: int) -> InputError:
    return InputError(
        f"{path}: a binary file (byte {place} is zero), not text; leave it out, or name its encoding in "
        "corpus.encoding if it is UTF-16"
    )


def _gunzip(path: Path, file: BinaryIO) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file, mode="rb") as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: broken gzip ({error}); fetch or compress it again") from None


def _unzstd(path: Path, file: BinaryIO) -> Iterator[bytes]:
    try:
        import zstandard
    except ModuleNotFoundError:
        raise RuntimeMissingError(f"{path}: reading .zst needs zstandard; pip install 'gpt2-bundle[build]'") from None
    # Not `stream_reader`: it takes a file that was cut short for a whole one.
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame: Any = None
    try:
        while data := file.read(_CHUNK // 8):
            while data:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise InputError(f"{path}: broken zstd ({error}); fetch or compress it again") from None
    if frame is not None:
        raise InputError(f"{path}: broken zstd (it ends inside a frame); fetch or compress it again")
