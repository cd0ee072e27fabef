"""One file of text, in any kind the corpus reads, as a stream of its records.

The kinds are .txt and .md (one record a file, or one a line), .jsonl, .ndjson, .csv, .tsv and .parquet (one record a
line or row) and .json (a list of records, or records one after the other), each of them also compressed as .gz or .zst.
Every reader streams: a file larger than memory is fine so long as each record fits.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from builder.data.json_stream import read_json_values
from builder.data.text_decoding import COMPRESSIONS, read_bytes, read_lines, read_text
from builder.recipe import CorpusRecipe
from serving.errors import InputError, RuntimeMissingError
from serving.support.suggestions import did_you_mean

_ROWS = 1024
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


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
# How many records were left out, by what they are instead of text.
Skipped = Counter[str]


class NotTextError(InputError):
    """A value that is not text; `reason` names what single records are left out for, and is empty for a mistake."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


def skips(error: NotTextError, recipe: CorpusRecipe, skipped: Skipped) -> bool:
    """Return whether a recipe leaves a record out that is not text, and count it."""
    if recipe.bad_records != "skip" or not error.reason:
        return False
    skipped[error.reason] += 1
    return True


def read_records(path: Path, recipe: CorpusRecipe, skipped: Skipped) -> Iterator[Record]:
    """Yield (place, text, label) of each record: the place is its line or row number, empty where the file is one.

    The label is that of `label_field`, numbers and truth values as text, empty where it is null or none is asked for.

    Raises InputError, with the file and the line, row or byte where it has one, for what cannot be read as text.
    """
    if kind_of(path) in _WHOLE and not recipe.label_field:
        yield from _read_lines_as_records(path, recipe) if recipe.document == "line" else _read_whole(path, recipe)
        return
    fields = {"corpus.text_field": recipe.text_field}
    if recipe.label_field:
        fields["corpus.label_field"] = recipe.label_field
    for place, where, (text, *labels) in read_values(path, fields, recipe, skipped):
        label = checked_label(labels[0], where, recipe.label_field) if labels else ""
        try:
            yield place, checked_text(text, where, recipe.text_field), label
        except NotTextError as error:
            if not skips(error, recipe, skipped):
                raise


def read_values(path: Path, fields: Fields, recipe: CorpusRecipe, skipped: Skipped) -> Iterator[Values]:
    """Yield (place, place in words, values) of each record, with the value of each of `fields` in their order.

    Values are what the file holds: strings from .csv, any JSON from .jsonl, any type from .parquet, whose bytes are
    decoded. A field's name may be a path through records in records, joined by dots. Raises InputError as
    `read_records` does, and for a file whose kind has no fields.
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
    yield from _READERS[kind](path, fields, recipe, skipped)


def _read_whole(path: Path, recipe: CorpusRecipe) -> Iterator[Record]:
    yield "", "".join(read_text(path, recipe.encoding)), ""


def _read_lines_as_records(path: Path, recipe: CorpusRecipe) -> Iterator[Record]:
    for number, line in enumerate(read_lines(path, recipe.encoding), 1):
        if line.strip():
            yield str(number), line.rstrip("\r\n"), ""


def _read_jsonl(path: Path, fields: Fields, recipe: CorpusRecipe, skipped: Skipped) -> Iterator[Values]:
    for number, line in enumerate(read_lines(path, recipe.encoding), 1):
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
        yield from _of_object(record, str(number), where, fields, recipe, skipped, "put one JSON object on each line")


def _read_json(path: Path, fields: Fields, recipe: CorpusRecipe, skipped: Skipped) -> Iterator[Values]:
    for number, record in enumerate(read_json_values(read_text(path, recipe.encoding), path), 1):
        where = f"{path}, record {number}"
        yield from _of_object(record, str(number), where, fields, recipe, skipped, "put a list of JSON objects there")


def _of_object(
    record: Any, place: str, where: str, fields: Fields, recipe: CorpusRecipe, skipped: Skipped, advice: str
) -> Iterator[Values]:
    """The values of one JSON record; none if it is left out."""
    if not isinstance(record, dict):
        error = NotTextError(f"{where}: a JSON {json_kind(record)}; {advice}", _reason(record))
        if not skips(error, recipe, skipped):
            raise error
        return
    yield place, where, tuple(_pick(record, key, field, where) for key, field in fields.items())


def _read_csv(path: Path, fields: Fields, recipe: CorpusRecipe, skipped: Skipped) -> Iterator[Values]:
    csv.field_size_limit(2**31 - 1)  # The default of 128 KiB is shorter than many documents; a C long holds this one.
    lines = read_lines(path, recipe.encoding)
    first = next(lines, "")
    delimiter = _delimiter(first, list(fields.values()), "\t" if kind_of(path) == ".tsv" else ",")
    reader = csv.reader(chain([first], lines), strict=True, delimiter=delimiter)
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
                    f"put quotes around text that contains {_DELIMITERS[delimiter]}"
                )
            if row:
                yield str(line), f"{path}, line {line}", tuple(row[column] for column in columns)
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}, line {line}: not valid CSV ({error}); mend the row or leave it out") from None


def _delimiter(first: str, wanted: list[str], usual: str) -> str:
    """What separates the columns: the first delimiter that gives the header all the wanted fields, else the usual."""
    for delimiter in dict.fromkeys([usual, *_DELIMITERS]):
        try:
            header = next(csv.reader([first], delimiter=delimiter), [])
        except csv.Error:
            continue
        if set(wanted) <= set(header):
            return delimiter
    return usual


def _read_parquet(path: Path, fields: Fields, recipe: CorpusRecipe, skipped: Skipped) -> Iterator[Values]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise RuntimeMissingError(f"{path}: reading Parquet needs pyarrow; pip install 'gpt2-bundle[build]'") from None
    with ExitStack() as stack:
        file: BinaryIO
        if path.suffix.lower() in COMPRESSIONS:  # Parquet is read from its end, so it cannot be streamed.
            file = stack.enter_context(tempfile.TemporaryFile())
            for chunk in read_bytes(path):
                file.write(chunk)
            file.seek(0)
        else:
            file = stack.enter_context(path.open("rb"))
        number = 0
        try:
            table = pyarrow.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            for batch in table.iter_batches(batch_size=_ROWS, columns=_columns(str(path), fields, table.schema_arrow)):
                for record in batch.to_pylist():
                    number += 1
                    where = f"{path}, row {number}"
                    values = (_walk(record, field if field in names else field.split(".")) for field in fields.values())
                    yield str(number), where, tuple(_decoded(value, where, recipe.encoding) for value in values)
        except UnicodeDecodeError:
            raise InputError(f"{path}, row {number + 1}: not UTF-8 text; mend the row or leave it out") from None
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path}: broken Parquet after row {number} ({reason}); fetch or write it again") from None


def _columns(where: str, fields: Fields, schema: Any) -> list[str]:
    """The columns to read, each once. Raises InputError for a field that is neither a column nor a path into one."""
    import pyarrow

    for key, field in fields.items():
        if field in schema.names:
            continue
        first, *rest = field.split(".")
        _check_fields(where, {key: first if rest else field}, schema.names)
        kind = schema.field(first).type
        for name in rest:
            known = (
                [kind.field(place).name for place in range(kind.num_fields)] if pyarrow.types.is_struct(kind) else []
            )
            _check_fields(where, {key: name}, known)
            kind = kind.field(name).type
    return list(dict.fromkeys(fields.values()))


def _decoded(value: Any, where: str, encoding: str) -> Any:
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode(encoding)
    except UnicodeError as error:
        raise InputError(f"{where}: not {encoding} text ({error}); set corpus.encoding or leave it out") from None


Reader = Callable[[Path, Fields, CorpusRecipe, Skipped], Iterator[Values]]
_WHOLE = (".txt", ".md")
_READERS: dict[str, Reader] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def checked_text(value: Any, where: str, field: str) -> str:
    """Return a field's value if it is text that UTF-8 can hold, else raise NotTextError."""
    if not isinstance(value, str):
        raise NotTextError(
            f"{where}: field {field!r} is a {json_kind(value)}, not a string; mend the record or leave it out",
            _reason(value),
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


def _reason(value: Any) -> str:
    kind = json_kind(value)
    return f"{kind} instead of text" if kind in ("null", "number") else ""


def _pick(record: dict[str, Any], key: str, field: str, where: str) -> Any:
    """A field of a record: of that very name, or by a path of names joined by dots."""
    if field in record:
        return record[field]
    first, *rest = field.split(".")
    if not rest or first not in record:
        _check_fields(where, {key: field}, list(record))
    return _walk(record, [first, *rest])


def _walk(value: Any, names: str | list[str]) -> Any:
    for name in [names] if isinstance(names, str) else names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _check_fields(where: str, fields: Fields, known: list[str]) -> None:
    for key, field in fields.items():
        if field not in known:
            raise InputError(f"{where}: no field {field!r} to read ({key}){did_you_mean(field, known)}")
