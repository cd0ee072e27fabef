"""Writes block-style YAML for people to read and edit, without a YAML library."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

# What YAML 1.1 and 1.2 both read as this very text; numbers, dates and words such as "on" are quoted.
_PLAIN = re.compile(r"[A-Za-z/](?:[A-Za-z0-9_./@-]|:(?=[A-Za-z0-9]))*")
_WORDS = frozenset(["y", "n", "yes", "no", "on", "off", "true", "false", "null"])


def yaml_text(documents: Iterable[object], comment: str = "") -> str:
    """Return `documents` of dicts, lists, strings, numbers, bools and None as YAML; `comment` becomes its first lines.

    Text of several lines becomes a literal block where that keeps every character.
    """
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    return head + "---\n".join(_block(each, "").removeprefix("\n").removeprefix(" ") for each in documents)


def _block(value: object, indent: str) -> str:
    """What follows a key's colon or a dash, its newline included; nested lines begin with `indent`."""
    if isinstance(value, dict) and value:
        return "\n" + "".join(f"{indent}{_scalar(key)}:{_block(each, indent + '  ')}" for key, each in value.items())
    if isinstance(value, list | tuple) and value:
        return "\n" + "".join(f"{indent}- {_block(each, indent + '  ').lstrip()}" for each in value)
    if isinstance(value, str) and _is_literal(value):
        return " |\n" + "".join(f"{indent}{line}\n" if line else "\n" for line in value[:-1].split("\n"))
    return f" {_scalar(value)}\n"


def _is_literal(text: str) -> bool:
    lines = text.split("\n")
    return (
        len(lines) > 2
        and lines[-1] == ""
        and lines[-2] != ""
        and lines[0] == lines[0].lstrip()
        and lines[0] != ""
        and all(line.isprintable() for line in lines)
    )


def _scalar(value: object) -> str:
    if not isinstance(value, str):
        return json.dumps(value)
    if _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    signs = (f"\\{sign}" if sign in '"\\' else sign if sign.isprintable() else f"\\U{ord(sign):08x}" for sign in value)
    return f'"{"".join(signs)}"'
