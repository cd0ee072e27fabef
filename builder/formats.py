"""One file of text, in any kind the corpus reads, as a stream of its records.

The kinds are .txt and .md (one record a file), .jsonl, .csv and .parquet (one record a line or row), each of them also
compressed as .gz or .zst. Every reader streams: a file larger than memory is fine so long as each record fits.
"""

from __future__ import annotations

import csv
import gzip
import json
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from serving.errors import InputError, RuntimeMissingError
from serving.suggest import did_you_mean

COMPRESSIONS = (".gz", ".zst")
_CHUNK = 1 << 20
_ROWS = 1024


def kind_of(path: Path) -> str | None:
    """Return the kind of a file by its ending (".txt", ".jsonl", ...), any compression left out; None if unknown."""
    if path.suffix.lower() in COMPRESSIONS:
        path = path.with_suffix("")
    ending = path.suffix.lower()
    return ending if ending in _READERS else None


def kinds() -> str:
    """Return the readable endings as a phrase for a message."""
    return f"{', '.join(_READERS)}, each also with {' or '.join(COMPRESSIONS)}"


Record = tuple[str, str, str]


def read_records(path: Path, text_field: str, label_field: str = "") -> Iterator[Record]:
    """Yield (place, text, label) of each record: the place is its line or row number, empty where the file is one.

    The label is that of `label_field`, numbers and truth values as text, empty where it is null or none is asked for.

    Raises InputError, with the file and the line, row or byte where it has one, for what cannot be read as text.
    """
    kind = kind_of(path)
    if kind is None:
        raise InputError(f"{path}: this kind of file is not read; give one of {kinds()}")
    yield from _READERS[kind](path, text_field, label_field)


def _read_whole(path: Path, text_field: str, label_field: str) -> Iterator[Record]:
    if label_field:
        raise InputError(
            f"{path}: this kind of file has no field {label_field!r} (corpus.label_field); "
            "give .jsonl, .csv or .parquet, or leave label_field empty"
        )
    yield "", _decode(b"".join(_chunks(path)), path, 0).removeprefix("\ufeff"), ""


def _read_jsonl(path: Path, text_field: str, label_field: str) -> Iterator[Record]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except RecursionError:
            raise InputError(f"{where}: JSON nested too deeply; flatten the record or leave it out") from None
        except ValueError as error:
            reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise InputError(f"{where}: not valid JSON ({reason}); put one whole JSON object on each line") from None
        if not isinstance(record, dict):
            raise InputError(f"{where}: a JSON {_json_kind(record)}; put one JSON object on each line")
        if text_field not in record:
            raise InputError(_no_field(where, text_field, list(record)))
        if label_field and label_field not in record:
            raise InputError(_no_field(where, label_field, list(record), "label_field"))
        label = _label(record[label_field], where, label_field) if label_field else ""
        yield str(number), _checked(record[text_field], where, text_field), label


def _read_csv(path: Path, text_field: str, label_field: str) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # The default of 128 KiB is shorter than many documents; a C long holds this one.
    reader = csv.reader(_lines(path), strict=True)
    line = 1
    try:
        header = next(reader, [])
        if text_field not in header:
            raise InputError(_no_field(f"{path}, line 1", text_field, header))
        if label_field and label_field not in header:
            raise InputError(_no_field(f"{path}, line 1", label_field, header, "label_field"))
        column = header.index(text_field)
        label_column = header.index(label_field) if label_field else None
        line = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):
                raise InputError(
                    f"{path}, line {line}: {len(row)} columns where the header has {len(header)}; "
                    "put quotes around text that contains commas"
                )
            if row:
                yield str(line), row[column], "" if label_column is None else row[label_column]
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}, line {line}: not valid CSV ({error}); mend the row or leave it out") from None


def _read_parquet(path: Path, text_field: str, label_field: str) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise RuntimeMissingError(f"{path}: reading Parquet needs pyarrow; pip install 'gpt2-bundle[build]'") from None
    with ExitStack() as stack:
        file: BinaryIO
        if path.suffix.lower() in COMPRESSIONS:  # Parquet is read from its end, so it cannot be streamed.
            file = stack.enter_context(tempfile.TemporaryFile())
            for chunk in _chunks(path):
                file.write(chunk)
            file.seek(0)
        else:
            file = stack.enter_context(path.open("rb"))
        number = 0
        try:
            table = pyarrow.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            if text_field not in names:
                raise InputError(_no_field(str(path), text_field, names))
            if label_field and label_field not in names:
                raise InputError(_no_field(str(path), label_field, names, "label_field"))
            for batch in table.iter_batches(batch_size=_ROWS, columns=[text_field, label_field or text_field]):
                texts, labels = batch.column(text_field), batch.column(label_field or text_field)
                for value, mark in zip(texts, labels, strict=True):
                    number += 1
                    where = f"{path}, row {number}"
                    label = _label(mark.as_py(), where, label_field) if label_field else ""
                    yield str(number), _checked(value.as_py(), where, text_field), label
        except UnicodeDecodeError:
            raise InputError(f"{path}, row {number}: not UTF-8 text; mend the row or leave it out") from None
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path}: broken Parquet after row {number} ({reason}); fetch or write it again") from None


_READERS: dict[str, Callable[[Path, str, str], Iterator[Record]]] = {
    ".txt": _read_whole,
    ".md": _read_whole,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, decompressed by its ending, in pieces."""
    with path.open("rb") as file:
        match path.suffix.lower():
            case ".gz":
                yield from _gunzip(path, file)
            case ".zst":
                yield from _unzstd(path, file)
            case _:
                while chunk := file.read(_CHUNK):
                    yield chunk


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


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file, each with its line end; only a line feed ends one, so that JSON and CSV see the rest."""
    pending, offset = b"", 0
    for chunk in _chunks(path):
        *whole, pending = (pending + chunk).split(b"\n")
        for line in whole:
            text = _decode(line + b"\n", path, offset)
            yield text if offset else text.removeprefix("\ufeff")
            offset += len(line) + 1
    if pending:
        text = _decode(pending, path, offset)
        yield text if offset else text.removeprefix("\ufeff")


def _decode(data: bytes, path: Path, offset: int) -> str:
    """UTF-8 to text; `offset` is where `data` starts in the (decompressed) file."""
    zero = data.find(b"\0")
    try:
        text = data.decode("utf-8")
        if zero < 0:
            return text
    except UnicodeDecodeError as error:
        if offset == 0 and data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError(f"{path}: UTF-16 text (byte 0 starts its mark); save it as UTF-8") from None
        if zero < 0 or error.start < zero:
            place = f"byte {offset + error.start} is {data[error.start]:#04x}"
            raise InputError(f"{path}: not UTF-8 text ({place}); save it as UTF-8 or leave it out") from None
    raise InputError(f"{path}: a binary file (byte {offset + zero} is zero), not UTF-8 text; leave it out")


def _checked(value: Any, where: str, text_field: str) -> str:
    if not isinstance(value, str):
        raise InputError(
            f"{where}: field {text_field!r} is a {_json_kind(value)}, not a string; mend the record or leave it out"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: field {text_field!r} has half a surrogate pair at character {error.start}; "
            "mend the record or leave it out"
        ) from None
    return value


def _label(value: Any, where: str, label_field: str) -> str:
    if value is None:
        return ""
    if isinstance(value, (bool, int, float)):
        return str(value)
    return _checked(value, where, label_field)


def _json_kind(value: Any) -> str:
    names = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "list"}
    return names.get(type(value), "object" if isinstance(value, dict) else type(value).__name__)


def _no_field(where: str, field: str, known: list[str], key: str = "text_field") -> str:
    return f"{where}: no field {field!r} to read (corpus.{key}){did_you_mean(field, known)}"
