"""One HTML page without scripts or outside references, light and dark, readable on a phone."""

from __future__ import annotations

import re
from html import escape

COLOURS = 6
_KANA, _HANGUL, _HAN = (re.compile(f"[{letters}]") for letters in ("\u3041-\u30fa", "\uac00-\ud7a3", "\u3400-\u9fff"))
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #5b6470; --faint: #d5dae0; --win: #d8f0de;
  --c0: #0b62c4; --c1: #c2410c; --c2: #15803d; --c3: #9333ea; --c4: #b3005e; --c5: #6b7280; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --paper: #14171b; --soft: #a3adba; --faint: #3a414b; --win: #1c4a2a;
    --c0: #6cb0ff; --c1: #ff9e64; --c2: #6ee7a0; --c3: #c9a2ff; --c4: #ff8ac4; --c5: #a8b0bc; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 48rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--ink); font-size: 11px; }
.axis { stroke: var(--faint); fill: none; } .curve { fill: none; stroke-width: 1.6; }
.legend b { margin-right: 1rem; font-weight: 600; white-space: nowrap; display: inline-block; }
.legend svg { display: inline-block; width: 26px; height: 10px; margin-right: .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; width: 100%; }
th, td { text-align: left; padding: 0.2rem 0.6rem; border-bottom: 1px solid var(--faint); }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.bar { width: 50%; } td.bar span { display: block; height: 0.8rem; background: var(--c0); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(16rem, 100%), 1fr)); gap: 1rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--faint); padding: 0.5rem;
  margin: 0 0 1rem; }
pre b { color: var(--c0); }
"""


def language_attribute(text: str) -> str:
    """Return ` lang="..."` for a text in Japanese, Korean or Chinese by its letters, whose shapes differ by language.

    Empty for other texts: pages are in English, and Latin letters look the same in any language.
    """
    for language, letters in (("ja", _KANA), ("ko", _HANGUL), ("zh", _HAN)):
        if letters.search(text):
            return f' lang="{language}"'
    return ""


def page(title: str, body: str, style: str = "") -> bytes:
    """Return a whole page, UTF-8, under its title; half a character, which UTF-8 has not, becomes `?`.

    `style` is added behind the common one, whose colours are --ink, --paper, --soft, --faint, --win and --c0 to --c5.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    ).encode("utf-8", "replace")


def section(title: str, content: str) -> str:
    """Return a heading and its content, or nothing where there is no content."""
    return f"<h2>{escape(title)}</h2>\n{content}\n" if content else ""


def colour(place: int) -> str:
    """The colour of the series in this place; after six they come again, and a chart draws those dashed."""
    return f"var(--c{place % COLOURS})"
