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
from serving.support.suggestions import did_you_mean

COMPRESSIONS = (".gz", ".zst")
_CHUNK = 1 << 20
_ROWS = 1024


def kind_of(path: Path) -> str | None:
    """Return the kind of a file by its ending (".txt", ".jsonl", ...), any compression left out; None if unknown."""
    if path.suffix.lower() in COMPRESSIONS:
        path = path.with_suffix("")
    ending = path.suffix.lower()
    return ending if ending in _WHOLE or ending in _READERS else None


def has_fields(path: Path) -> bool:
    """Return whether a file's kind has records with fields."""
    return kind_of(path) in _READERS


def kinds() -> str:
    """Return the readable endings as a phrase for a message."""
    return f"{', '.join([*_WHOLE, *_READERS])}, each also with {' or '.join(COMPRESSIONS)}"


Record = tuple[str, str, str]
# A value's place in its file, the same in words, and the values of the fields that were asked for.
Values = tuple[str, str, tuple[Any, ...]]
# Recipe key to the field that it names.
Fields = dict[str, str]


def read_records(path: Path, text_field: str, label_field: str = "") -> Iterator[Record]:
    """Yield (place, text, label) of each record: the place is its line or row number, empty where the file is one.

    The label is that of `label_field`, numbers and truth values as text, empty where it is null or none is asked for.

    Raises InputError, with the file and the line, row or byte where it has one, for what cannot be read as text.
    """
    if kind_of(path) in _WHOLE and not label_field:
        yield "", _read_whole(path), ""
        return
    fields = {"corpus.text_field": text_field} | ({"corpus.label_field": label_field} if label_field else {})
    for place, where, (text, *labels) in read_values(path, fields):
        label = checked_label(labels[0], where, label_field) if labels else ""
        yield place, checked_text(text, where, text_field), label


def read_values(path: Path, fields: Fields) -> Iterator[Values]:
    """Yield (place, place in words, values) of each record, with the value of each of `fields` in their order.

    Values are what the file holds: strings from .csv, any JSON from .jsonl, any type from .parquet. Raises InputError
    as `read_records` does, and for a file whose kind has no fields.
    """
    kind = kind_of(path)
    if kind is None:
        raise InputError(f"{path}: this kind of file is not read; give one of {kinds()}")
    if kind in _WHOLE:
        key, field = next((key, field) for key, field in fields.items() if key != "corpus.text_field")
        raise InputError(
            f"{path}: this kind of file has no field {field!r} ({key}); "
            f"give .jsonl, .csv or .parquet, or leave {key.rpartition('.')[2]} empty"
        )
    yield from _READERS[kind](path, fields)


def _read_whole(path: Path) -> str:
    return _decode(b"".join(_chunks(path)), path, 0).removeprefix("\ufeff")


def _read_jsonl(path: Path, fields: Fields) -> Iterator[Values]:
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
            raise InputError(f"{where}: a JSON {json_kind(record)}; put one JSON object on each line")
        _check_fields(where, fields, list(record))
        yield str(number), where, tuple(record[field] for field in fields.values())


def _read_csv(path: Path, fields: Fields) -> Iterator[Values]:
    csv.field_size_limit(2**31 - 1)  # The default of 128 KiB is shorter than many documents; a C long holds this one.
    reader = csv.reader(_lines(path), strict=True)
    line = 1
    try:
        header = next(reader, [])
        _check_fields(f"{path}, line 1", fields, header)
        columns = [header.index(field) for field in fields.values()]
        line = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):
                raise InputError(
                    f"{path}, line {line}: {len(row)} columns where the header has {len(header)}; "
                    "put quotes around text that contains commas"
                )
            if row:
                yield str(line), f"{path}, line {line}", tuple(row[column] for column in columns)
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}, line {line}: not valid CSV ({error}); mend the row or leave it out") from None


def _read_parquet(path: Path, fields: Fields) -> Iterator[Values]:
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
            _check_fields(str(path), fields, table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=_ROWS, columns=list(dict.fromkeys(fields.values()))):
                for values in zip(*(batch.column(field) for field in fields.values()), strict=True):
                    number += 1
                    yield str(number), f"{path}, row {number}", tuple(value.as_py() for value in values)
        except UnicodeDecodeError:
            raise InputError(f"{path}, row {number}: not UTF-8 text; mend the row or leave it out") from None
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path}: broken Parquet after row {number} ({reason}); fetch or write it again") from None


_WHOLE = (".txt", ".md")
_READERS: dict[str, Callable[[Path, Fields], Iterator[Values]]] = {
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


def checked_text(value: Any, where: str, field: str) -> str:
    """Return a field's value if it is text that UTF-8 can hold, else raise InputError."""
    if not isinstance(value, str):
        raise InputError(
            f"{where}: field {field!r} is a {json_kind(value)}, not a string; mend the record or leave it out"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: field {field!r} has half a surrogate pair at character {error.start}; "
            "mend the record or leave it out"
        ) from None
    return value


def checked_label(value: Any, where: str, field: str) -> str:
    """Return a label as text, empty for null, else raise InputError as `checked_text` does."""
    if value is None:
        return ""
    if isinstance(value, (bool, int, float)):
        return str(value)
    return checked_text(value, where, field)


def json_kind(value: Any) -> str:
    """Return what JSON calls a value's type."""
    names = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "list"}
    return names.get(type(value), "object" if isinstance(value, dict) else type(value).__name__)


def _check_fields(where: str, fields: Fields, known: list[str]) -> None:
    for key, field in fields.items():
        if field not in known:
            raise InputError(f"{where}: no field {field!r} to read ({key}){did_you_mean(field, known)}")
