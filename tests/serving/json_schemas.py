"""Schemas drawn from a seed, all of which allow only short texts."""

from __future__ import annotations

import random
from typing import Any

_NAMES = ("name", "age", "tags", "ok", "id", "é", "a b", 'q"', "x\\y", "nested")


def random_schema(seed: int) -> dict[str, Any]:
    """An object at the top, as most callers have it, or now and then anything else."""
    draw = random.Random(seed)
    schema = _object(draw, 3) if draw.random() < 0.8 else _any(draw, 3)
    if draw.random() < 0.2:
        return {"$defs": {"part": _any(draw, 1)}, "type": "object", "properties": {
            "part": {"$ref": "#/$defs/part"}, "whole": schema,
        }, "required": ["part", "whole"], "additionalProperties": False}  # fmt: skip
    return schema


def _any(draw: random.Random, depth: int) -> dict[str, Any]:
    simple = [_string, _integer, _number, _choice, _simple]
    return draw.choice(simple if depth <= 0 else [*simple, _object, _object, _array, _union])(draw, depth - 1)


def _string(draw: random.Random, depth: int) -> dict[str, Any]:
    kind = draw.randrange(4)
    if kind == 0:
        return {
            "type": "string",
            "pattern": draw.choice(["^[a-c]{2,5}$", "^(ab|c)+d$", "^x?[0-9]{1,3}$", "^é*$"]),
            "maxLength": 12,
        }
    if kind == 1:
        return {"type": "string", "format": draw.choice(["date", "time", "uuid", "ipv4"])}
    low = draw.randrange(4)
    return {"type": "string", "minLength": low, "maxLength": low + draw.randrange(1, 9)}


def _integer(draw: random.Random, depth: int) -> dict[str, Any]:
    low = draw.randrange(-2000, 2000)
    return {"type": "integer", "minimum": low, "maximum": low + draw.randrange(0, 500)}


def _number(draw: random.Random, depth: int) -> dict[str, Any]:
    low = draw.randrange(-50, 50) / 4
    return {"type": "number", draw.choice(["minimum", "exclusiveMinimum"]): low, "maximum": low + 1 + draw.randrange(9)}


def _choice(draw: random.Random, depth: int) -> dict[str, Any]:
    values = [
        draw.choice(["red", "blue é", 'say "hi"', "", 7, -1.5, True, None, [1, "a"], {"k": None}]) for _ in range(3)
    ]
    return {"const": values[0]} if draw.random() < 0.3 else {"enum": values}


def _simple(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"type": draw.choice(["boolean", "null", ["boolean", "null"]])}


def _object(draw: random.Random, depth: int) -> dict[str, Any]:
    names = draw.sample(_NAMES, draw.randrange(1, 5))
    required = [name for name in names if draw.random() < 0.6]
    return {
        "type": "object",
        "properties": {name: _any(draw, depth - 1) for name in names},
        "required": required,
        "additionalProperties": False,
    }


def _array(draw: random.Random, depth: int) -> dict[str, Any]:
    low = draw.randrange(3)
    array = {"type": "array", "items": _any(draw, depth - 1), "minItems": low, "maxItems": low + draw.randrange(1, 3)}
    if draw.random() < 0.2:
        array["prefixItems"] = [_any(draw, 0)]
    return array


def _union(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(draw, depth - 1) for _ in range(draw.randrange(2, 4))]}
