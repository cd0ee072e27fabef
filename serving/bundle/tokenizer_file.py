"""What a bundle's tokenizer.json may ask for: a byte-level BPE, and nothing whose work grows beyond its text's.

The library that reads it does whatever the file says: chains of replacements that double a text each, patterns that
take exponential time, 300 million tokens of padding. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from serving.bundle.strict_json import refuse, shown

MAX_BYTES = 64 * 2**20
# Each at most a few times as long as the text that it is given, in linear time.
_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Sequence"}
_RULES = {"ByteLevel", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "Sequence"}
_MAX_STEPS = 16


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
        for kind in steps:
            if kind not in known:
                raise refuse(where, f"tokenizer.json has a {key} of the type {shown(kind)}, which is not run here")


def _steps(value: Any) -> Iterator[Any]:
    """The types of a component and of all those in it, in order, up to one more than there may be."""
    pending, count = [value] if value is not None else [], 0
    while pending and count <= _MAX_STEPS:
        step = pending.pop()
        count += 1
        kind = step.get("type") if isinstance(step, dict) else step
        yield kind if isinstance(kind, str) else shown(kind)
        if isinstance(step, dict):
            for key in ("normalizers", "pretokenizers"):
                inner = step.get(key)
                pending += inner[: _MAX_STEPS + 1] if isinstance(inner, list) else []
