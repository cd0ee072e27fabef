"""What a bundle's tokenizer.json may ask for: nothing whose work grows beyond its text's.

The library that reads it does whatever the file says: chains of replacements that double a text each, patterns that
take exponential time, 300 million tokens of padding. Standard library only.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from re import _parser as re_parser  # type: ignore[attr-defined]
from typing import Any

from serving.bundle.strict_json import refuse, shown

MAX_BYTES = 64 * 2**20
# Each at most a few times as long as the text that it is given, in linear time.
_NORMALIZERS = {
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Lowercase",
    "Strip",
    "StripAccents",
    "BertNormalizer",
    "Replace",
    "Sequence",
}
_RULES = {
    "ByteLevel",
    "Digits",
    "Punctuation",
    "Whitespace",
    "WhitespaceSplit",
    "BertPreTokenizer",
    "Split",
    "Sequence",
}
_MAX_STEPS = 16
_MAX_PATTERN = 1024
# What Python's parser does not know of Oniguruma's syntax, as something of the same shape.
_CLASSES = re.compile(r"\\[pP]\{\^?\w+\}|\\[hHRX]")


def check_tokenizer(data: bytes, where: str) -> None:
    """Raise BundleError if the text of a tokenizer.json asks for what is not done here; `where` names its folder."""
    try:
        table = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise refuse(where, f"tokenizer.json is not JSON ({str(error)[:100]})") from None
    if not isinstance(table, dict) or not isinstance(table.get("model"), dict):
        raise refuse(where, "tokenizer.json is not a tokenizer")
    for key, known in (("normalizer", _NORMALIZERS), ("pre_tokenizer", _RULES)):
        steps = list(_steps(table.get(key)))
        if len(steps) > _MAX_STEPS:
            raise refuse(where, f"tokenizer.json has a {key} of more than {_MAX_STEPS} steps")
        for kind, step in steps:
            if kind not in known:
                raise refuse(where, f"tokenizer.json has a {key} of the type {shown(kind)}, which is not run here")
            if kind in ("Replace", "Split") and (problem := _pattern_problem(step, kind)) is not None:
                raise refuse(where, f"tokenizer.json has a {key} of the type {kind} {problem}")


def _pattern_problem(step: Any, kind: str) -> str | None:
    """Why the pattern of a step is not run here, or None: it may take exponential time, or make a text longer."""
    pattern = step.get("pattern")
    literal = pattern.get("String") if isinstance(pattern, dict) else None
    text = literal if literal is not None else pattern.get("Regex") if isinstance(pattern, dict) else None
    if not isinstance(text, str) or not 0 < len(text) <= _MAX_PATTERN:
        return f"without a pattern of 1 to {_MAX_PATTERN} characters"
    if kind == "Replace":
        content = step.get("content")
        if not isinstance(content, str) or len(content) > (len(text) if literal is not None else 1):
            return "that makes a text longer"
    return None if literal is not None or not _may_explode(text) else "whose pattern may take exponential time"


def _may_explode(pattern: str) -> bool:
    """Whether a repetition without a bound holds another one or alternatives, or there is a reference to a group."""
    try:
        with warnings.catch_warnings(action="ignore"):
            # Possessive and atomic groups, and flags within the pattern, are Python's too.
            tree = re_parser.parse(_CLASSES.sub(r"\\w", pattern))
    except (re.error, RecursionError, OverflowError):
        return True
    return _nested(tree, False)


def _nested(tree: Any, repeated: bool) -> bool:
    for name, value in tree:
        kind = str(name)
        # Alternatives that are repeated may overlap, as in (a|aa)+.
        if kind.startswith("GROUPREF") or (kind == "BRANCH" and repeated):
            return True
        within = repeated
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            many = value[1] is re_parser.MAXREPEAT or value[1] > _MAX_STEPS
            if many and repeated:
                return True
            within = repeated or many
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, re_parser.SubPattern):
                if _nested(part, within):
                    return True
            elif isinstance(part, list) and any(
                isinstance(each, re_parser.SubPattern) and _nested(each, within) for each in part
            ):
                return True
    return False


def _steps(value: Any) -> Iterator[tuple[Any, Any]]:
    """A component and all those in it as (type, component), in order, up to one more than there may be."""
    pending, count = [value] if value is not None else [], 0
    while pending and count <= _MAX_STEPS:
        step = pending.pop()
        count += 1
        kind = step.get("type") if isinstance(step, dict) else step
        yield kind if isinstance(kind, str) else shown(kind), step
        if isinstance(step, dict):
            for key in ("normalizers", "pretokenizers"):
                inner = step.get(key)
                pending += inner[: _MAX_STEPS + 1] if isinstance(inner, list) else []
