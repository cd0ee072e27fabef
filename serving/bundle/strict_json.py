"""JSON read without leniency: nothing unknown, doubled, missing or of another type passes, and each refusal is named.

Two layers: `loads` turns bytes into plain values under limits, and `read` turns plain values into a tree of frozen
dataclasses by their annotations. Both raise `BundleError` only, whatever the bytes are.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import reprlib
import types
import typing
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from serving.errors import BundleError
from serving.support.suggestions import did_you_mean

MAX_BYTES = 16 * 2**20
MAX_DEPTH = 64
MAX_ITEMS = 10_000
"""Of one list or table that the schema names."""
MAX_KEY = 1024
"""Characters of a key."""
ADVICE = "build the bundle again or get an unchanged copy"

T = TypeVar("T")
# A check returns what is wrong as "must ...", or None.
Check = Callable[[Any], "str | None"]

# A string is one match even if it never ends, so that hostile input is scanned once and not once per quote.
_STRUCTURE = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_KINDS = {dict: "a table", list: "a list", str: "text", bool: "true or false", int: "an integer", type(None): "null"}


def refuse(where: str, problem: str) -> BundleError:
    """The error for `problem` in the file or folder `where`, with the advice that fits every damaged bundle."""
    return BundleError(f"{where}: {problem}; {ADVICE}")


def shown(value: object) -> str:
    """`value` as short, printable, one-line text for an error message."""
    return reprlib.repr(value)


def _depth(data: bytes) -> int:
    depth = deepest = 0
    for match in _STRUCTURE.finditer(data):
        first = match[0][0]
        if first in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif first in b"]}":
            depth -= 1
    return deepest


def loads(data: bytes, where: str) -> Any:
    """Parse one JSON document of UTF-8 text.

    Raises BundleError, with `where` as the file's name, for more than MAX_BYTES or MAX_DEPTH levels, bytes that are
    not UTF-8, broken JSON, a key that occurs twice in one table, NaN and infinities (also as 1e999), integers too long
    to convert, and text with unpaired surrogates.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        longest = max(table, key=len, default="")
        if len(longest) > MAX_KEY:
            raise refuse(where, f"the key {shown(longest)} has more than {MAX_KEY} characters")
        if len(table) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise refuse(where, f"the key {shown(twice)} occurs twice in one table")
        return table

    def constant(name: str) -> Any:
        raise refuse(where, f"{name} is not a JSON number")

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise refuse(where, f"the number {shown(text)} is too large")
        return value

    if len(data) > MAX_BYTES:
        raise refuse(where, f"larger than the limit of {MAX_BYTES} bytes")
    if _depth(data) > MAX_DEPTH:
        raise refuse(where, f"nested deeper than {MAX_DEPTH} levels")
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant, parse_float=number)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        raise refuse(where, "not valid UTF-8 text") from None
    except ValueError as error:
        raise refuse(where, f"not valid JSON ({error})") from None
    return value


def join(where: str, key: str) -> str:
    """The path of `key` inside `where`: `model.n_embd`, or `graphs['ort/fp32']` for a key that is not a word."""
    if not _IDENTIFIER.match(key):
        return f"{where}[{shown(key)}]"
    return f"{where}.{key}" if where else key


def _kind(value: object) -> str:
    return _KINDS.get(type(value), "a number")


def read(kind: type[T], value: Any, file: str, where: str = "") -> T:
    """Turn `value` into the dataclass `kind`, refusing whatever its annotations do not name.

    `file` names the document and `where` the place in it. Annotations may be dataclasses, int, float (which takes
    integers too), str, Literal, `tuple[X, ...]`, `dict[str, X]`, unions of scalars, Any, and `Annotated[X, check]`
    with a Check that the value must pass. A field with a default is optional. Raises BundleError with the full path
    of the offending key.
    """
    result: T = _read(kind, value, file, where)
    return result


def _read(kind: Any, value: Any, file: str, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if type(value) in (list, dict) and len(value) > MAX_ITEMS:
        raise refuse(file, f"{where or 'the document'} has {len(value)} items; it may have {MAX_ITEMS}")
    if origin is Annotated:
        result = _read(arguments[0], value, file, where)
        problem = arguments[1](result)
        if problem:
            raise refuse(file, f"{where} is {shown(result)} but {problem}")
        return result
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _read_table(kind, value, file, where)
    if origin is Literal:
        if type(value) is str and value in arguments:
            return value
        raise refuse(file, f"{where} is {shown(value)} but must be one of {', '.join(map(repr, arguments))}")
    if origin is tuple and type(value) is list:
        return tuple(_read(arguments[0], item, file, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict and type(value) is dict:
        return {key: _read(arguments[1], item, file, join(where, key)) for key, item in value.items()}
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            if type(value) is option:
                return value
    elif kind is float and type(value) in (int, float):
        try:
            return float(value)
        except OverflowError:
            raise refuse(file, f"{where} is too large") from None
    elif type(value) is kind:
        return value
    raise refuse(file, f"{where or 'the document'} is {_kind(value)} but must be {_wanted(kind)}")


def _wanted(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_wanted(option) for option in typing.get_args(kind) if option is not type(None))
    return _KINDS.get({tuple: list}.get(origin, origin) if origin else kind, "a number")


def _read_table(kind: type, value: Any, file: str, where: str) -> Any:
    if type(value) is not dict:
        raise refuse(file, f"{where or 'the document'} is {_kind(value)} but must be a table")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind, include_extras=True)
    for key in value:
        if key not in fields:
            raise refuse(file, f"unknown key {join(where, key)}{did_you_mean(key, fields).rstrip('?')}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        place = join(where, name)
        if name not in value:
            if field.default is dataclasses.MISSING:
                raise refuse(file, f"the key {place} is missing")
            continue
        values[name] = _read(hints[name], value[name], file, place)
    return kind(**values)
