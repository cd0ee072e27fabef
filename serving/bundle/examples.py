"""Prompts in a bundle's own language, from the text that it was held to. Standard library only."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

# A bundle of an older version, or a draft, has none of its own.
_OTHERWISE = "Return the"


def example_prompts(folder: Path) -> list[str]:
    """Return texts that the bundle in `folder` may be asked to continue, at least one."""
    return _texts(folder, "examples") or [_OTHERWISE]


def example_messages(folder: Path) -> list[str]:
    """Return messages that the bundle in `folder` may be sent in a chat; of one not trained on instructions, none."""
    return _texts(folder, "example_messages")


def _texts(folder: Path, key: str) -> list[str]:
    try:
        found = json.loads((folder / "golden.json").read_text(encoding="utf-8"))[key]
        return [text for text in found if isinstance(text, str) and text.strip()]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def generate_arguments(folder: Path) -> str:
    """Return the arguments that follow `gpt2-bundle generate BUNDLE`, for the bundle in `folder`."""
    messages = example_messages(folder)
    return f"--chat {shell_quoted(messages[0])}" if messages else shell_quoted(example_prompts(folder)[0])


def shell_quoted(text: str) -> str:
    """Return a text as one word of a POSIX shell; of several lines or with control characters, on one line."""
    return shlex.quote(" ".join("".join(sign if sign.isprintable() else " " for sign in text).split()))
