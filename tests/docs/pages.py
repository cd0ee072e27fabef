"""The shell commands that stand in README and docs/."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")])
# A command of each of these is checked in some way by a test of this folder.
CHECKED = ("gpt2-bundle", "make", "curl", "python")
# What a reader does around them: it changes the shell, installs, or needs a Docker engine or a Ray cluster.
AROUND = (
    "source", "cd", "pip", "docker", "export", "ulimit", "lm_eval", "ray", "serve", "hf", "rm", "oras", "openssl",
    "kubectl",
)  # fmt: skip


@dataclass(frozen=True)
class ShellCommand:
    """One command of a page: its words, without redirections, and where it stands."""

    page: Path
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {shlex.join(self.words)[:60]}"


def commands_of(page: Path) -> list[ShellCommand]:
    """The commands in the ```sh blocks of `page`; `a && b` is two. Raises ValueError for an open quote."""
    found: list[ShellCommand] = []
    text = page.read_text(encoding="utf-8")
    for block in re.finditer(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        first = text.count("\n", 0, block.start()) + 2
        found += _split(page, first, block[1].splitlines())
    return found


def _split(page: Path, first: int, lines: list[str]) -> list[ShellCommand]:
    found: list[ShellCommand] = []
    held, start = "", first
    for number, line in enumerate(lines, start=first):
        held += line
        if held.endswith("\\"):
            held = held[:-1]
            continue
        try:
            lexer = shlex.shlex(held, posix=True, punctuation_chars="&|;")
            lexer.whitespace_split = True
            words = list(lexer)
        except ValueError:
            held += "\n"
            continue
        found += [ShellCommand(page, start, part) for part in _parts(words)]
        held, start = "", number + 1
    if held:
        raise ValueError(f"{page}: an open quote in the block at line {first}")
    return found


def _parts(words: list[str]) -> list[tuple[str, ...]]:
    """The commands between `&&`, `|` and `;`."""
    parts: list[list[str]] = [[]]
    for word in words:
        if set(word) <= set("&|;"):
            parts.append([])
        else:
            parts[-1].append(word)
    return [tuple(part) for part in parts if part]


def every_command(*names: str) -> list[ShellCommand]:
    """The commands of all pages that begin with one of `names`."""
    return [command for page in PAGES for command in commands_of(page) if command.words[0] in names]
