"""Prompts in a bundle's own language, from the text that it was held to. Standard library only."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

# A bundle of an older version, or a draft, has none of its own.
_OTHERWISE = "Return the"


def example_prompts(folder: Path) -> list[str]:
    """Return texts that the bundle in `folder` may be asked to continue, at least one."""
    try:
        found = json.loads((folder / "golden.json").read_text(encoding="utf-8"))["examples"]
        texts = [text for text in found if isinstance(text, str) and text.strip()]
    except (OSError, ValueError, KeyError, TypeError):
        texts = []
    return texts or [_OTHERWISE]


def shell_quoted(text: str) -> str:
    """Return a text as one word of a POSIX shell; of several lines or with control characters, on one line."""
    return shlex.quote(" ".join("".join(sign if sign.isprintable() else " " for sign in text).split()))
