"""A corpus of any size for measuring preparation: made from the running Python's own sources, the same for a seed.

A document is a dozen or so runs of lines drawn from all over the standard library, so that documents differ from each
other at any size of the corpus. Some are pages of HTML, some have rulings, control characters or letters with separate
accents; some are exact copies of one before, and some copies with a run of lines exchanged.
"""

from __future__ import annotations

import html
import json
import random
import sysconfig
import unicodedata
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

_POOL_CHARACTERS = 24_000_000
_REMEMBERED = 2000
EXACT_COPIES, NEAR_COPIES, PAGES, RULED, CONTROLLED, ACCENTED = 0.02, 0.05, 0.10, 0.10, 0.05, 0.05


def write_corpus(path: Path, characters: int, seed: int = 0) -> int:
    """Write documents of some 2,000 characters as JSON lines until they have `characters`; return their number."""
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for text in _documents(random.Random(seed)):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            count, characters = count + 1, characters - len(text)
            if characters <= 0:
                break
    return count


def write_novel(path: Path, megabytes: float, seed: int = 0) -> int:
    """Write one text of so many million bytes in the manner of a Chinese novel, and return its characters.

    A paragraph begins with two ideographic spaces and has no other white space. Words are one to three Han characters
    drawn at random, as often as Zipf's law has them.
    """
    draw = random.Random(seed)
    words = [
        "".join(chr(draw.randint(0x4E00, 0x9000)) for _ in range(draw.choice((1, 2, 2, 2, 3)))) for _ in range(20_000)
    ]
    weights = list(accumulate(1 / (rank + 3) for rank in range(len(words))))
    size = characters = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        while size < megabytes * 1e6:
            chosen = draw.choices(words, cum_weights=weights, k=400)
            marks = draw.choices(("", "，", "。", "！", "？", "；"), (75, 14, 8, 1, 1, 1), k=400)
            text = "\u3000\u3000" + "".join(word + mark for word, mark in zip(chosen, marks, strict=True)) + "。\n"
            file.write(text)
            size, characters = size + len(text.encode()), characters + len(text)
    return characters


def _documents(draw: random.Random) -> Iterator[str]:
    lines = _lines()
    recent: list[list[str]] = []
    while True:
        kind = draw.random()
        if recent and kind < EXACT_COPIES + NEAR_COPIES:
            runs = list(draw.choice(recent))
            if kind >= EXACT_COPIES:
                runs[draw.randrange(len(runs))] = _run(lines, draw)[:80]
        else:
            runs = [_run(lines, draw) for _ in range(draw.randint(6, 30))]
            recent.append(runs)
            if len(recent) > _REMEMBERED:
                del recent[: _REMEMBERED // 2]
        yield _dirty(runs, draw)


def _run(lines: list[str], draw: random.Random) -> str:
    start, length = draw.randrange(len(lines)), draw.randint(1, 4)
    return "\n".join(lines[start : start + length])


def _dirty(runs: list[str], draw: random.Random) -> str:
    if draw.random() < PAGES:
        parts = "".join(f"<p class='x'>{html.escape(run)}</p>\n" for run in runs)
        return f"<html><head><style>p {{ margin: 0 }}</style></head><body>{parts}</body></html>"
    if draw.random() < RULED:
        runs = [*runs[:2], "=" * 70, *runs[2:]]
    if draw.random() < CONTROLLED:
        runs = ["\ufeff" + runs[0], *runs[1:-1], runs[-1] + "\u200b\x1b[0m"]
    text = "\n".join(runs)
    if draw.random() < ACCENTED:
        text += unicodedata.normalize("NFD", "\nDéjà vu: naïve café, Ärger über Öl.")
    return text


def _lines() -> list[str]:
    """The lines that say something, of the library's modules in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    lines: list[str] = []
    characters = 0
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        if "site-packages" in path.parts or "dist-packages" in path.parts:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        lines += [line for line in text.replace("\0", "").splitlines() if len(line.strip()) > 20]
        characters += len(text)
        if characters > _POOL_CHARACTERS:
            break
    return lines
