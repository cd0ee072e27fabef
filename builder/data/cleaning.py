"""Clean one text: pure functions from a text to (the text cleaned, whether that changed it).

No step raises, whatever the text. Each but `strip_html` gives its own output back unchanged; so do all of them
in a row, with that step off. (HTML cannot: a page that shows `&lt;b&gt;` becomes a text that says `<b>`, which is to
stay.)
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Container, Iterator
from html.parser import HTMLParser
from typing import Literal

from builder.data.text_boundaries import last_boundary
from builder.recipe import CleaningRecipe

Cleaned = tuple[str, bool]
Step = tuple[str, Callable[[str], Cleaned]]


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


# C0 and C1 controls but tab and the line ends, with whole terminal sequences; soft hyphen, zero-width space, word
# joiner and byte-order mark; direction marks, invisible operators, fillers and tags. The two joiners U+200C and U+200D
# stay: Persian, the scripts of India and emoji are spelled with them.
_INVISIBLE = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e"
    r"\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0001\U000e0020-\U000e007e]"
)
# Of these alone, a row means nothing. ASCII's brackets and quotes are not among them: a row of those closes something.
# After ASCII's come the marks of Chinese and Japanese, in full width too, and arrows, shapes and ornaments.
_ASCII_MARKS = "=-~_*#+^.,:;!?<>|\\/&%$@"
_WIDE_MARKS = "！＂＃＄％＆＇＊＋，－．／：；＜＝＞？＠＼＾＿｀｜～￣￤、。〃〈-】〒-〟〰・｡､･"
_MARKS = re.escape(_ASCII_MARKS) + _WIDE_MARKS + "·•…‥※‼⁇-⁉‐-―←-⇿⋯■-⛿✀-➿⬀-⯿"
_BOX = "\u2500-\u259f"
_RUN = rf"(?:([{_MARKS}])\1{{3,}}+|[{_BOX}]{{2,}}+)"
_RUNS = re.compile(_RUN)
# Of ornaments three in a line of their own are a row: they part scenes.
_ORNAMENTS = "※＊～■-⛿✀-➿"
_RUN_LINE = re.compile(rf"^[ \t\u3000]*+(?>(?:{_RUN}|([{_ORNAMENTS}])\2{{2}})[ \t\u3000]*+)++(?:\n|\Z)", re.MULTILINE)
_LINE_ENDS = "\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
_LINE_END = re.compile(rf"\r\n|[{_LINE_ENDS}]")
_EMPTY_LINES = re.compile(r"\n{3,}")
_INNER = re.compile(r"(?<=\S)(?:[^\S\n]{2,}+|[^\S\n ])(?=\S)")
_MARKUP = re.compile(r"<[a-zA-Z/!?]|&[#a-zA-Z]")
_HIDDEN = frozenset({"script", "style", "noscript", "template", "svg", "head"})
_INLINE = _names(
    "a abbr b bdi bdo big cite code data del dfn em font i img ins kbd label mark q s samp small span strike strong "
    "sub sup time tt u var wbr"
)
_BLOCKS = _names(
    "address article aside blockquote body br button caption center col colgroup dd details dialog div dl dt fieldset "
    "figcaption figure footer form h1 h2 h3 h4 h5 h6 header hr html iframe input legend li link main meta nav ol "
    "optgroup option p picture pre section select source summary table tbody td textarea tfoot th thead title tr ul "
    "video audio canvas object embed param area map"
)
_CELLS = frozenset({"td", "th"})


def steps(recipe: CleaningRecipe) -> Iterator[Step]:
    """Yield the (name, function) of each switched-on step that needs no other document, in the order they run."""
    if recipe.html:
        yield "html", strip_html
    if recipe.invisible:
        yield "invisible", remove_invisible
    if recipe.unicode == "NFC":
        yield "unicode", lambda text: normalize(text, "NFC")
    elif recipe.unicode == "NFKC":
        yield "unicode", lambda text: normalize(text, "NFKC")
    if recipe.symbols == "collapse":
        yield "symbols", collapse_symbols
    elif recipe.symbols == "drop":
        yield "symbols", drop_symbols
    if recipe.white_space != "keep":
        yield "white_space", lambda text: tidy_space(text, words=recipe.white_space == "words")


def normalize(text: str, form: Literal["NFC", "NFKC"]) -> Cleaned:
    """Compose characters (NFC), or also replace compatibility forms such as ligatures and full width (NFKC)."""
    if unicodedata.is_normalized(form, text):
        return text, False
    return unicodedata.normalize(form, text), True


def remove_invisible(text: str) -> Cleaned:
    """Remove control characters, terminal sequences and characters without width that spell nothing."""
    cleaned, count = _INVISIBLE.subn("", text)
    return cleaned, bool(count)


def collapse_symbols(text: str) -> Cleaned:
    """Shorten each row of four or more equal symbols to three, and each row of box drawing to its first character."""
    if not _may_have_runs(text):
        return text, False
    cleaned = _RUNS.sub(lambda match: match[1] * 3 if match[1] else match[0][0], text)
    return cleaned, cleaned != text


def drop_symbols(text: str) -> Cleaned:
    """Remove lines that are nothing but such rows, and put one space for a row inside a line."""
    if not _may_have_runs(text):
        return text, False
    cleaned = _RUNS.sub(" ", _RUN_LINE.sub("", text))
    return cleaned, cleaned != text


def _may_have_runs(text: str) -> bool:
    """False only for ASCII without a run, which these searches find out in a quarter of the expression's time."""
    return not text.isascii() or any(mark * 4 in text for mark in _ASCII_MARKS)


def tidy_space(text: str, *, words: bool) -> Cleaned:
    """Unify line ends to a line feed, strip lines' ends and the document's, and leave at most one empty line running.

    With `words`, blanks between two words become one space too; indentation stays.
    """
    # Looking for single characters first is many times faster than the expression on text that has none.
    cleaned = _LINE_END.sub("\n", text) if any(end in text for end in _LINE_ENDS) else text
    cleaned = "\n".join([line.rstrip() for line in cleaned.split("\n")]).rstrip()
    if "\n\n\n" in cleaned:
        cleaned = _EMPTY_LINES.sub("\n\n", cleaned)
    start = len(cleaned) - len(cleaned.lstrip())
    cleaned = cleaned[cleaned.rfind("\n", 0, start) + 1 :]  # The first line keeps its indentation.
    if words:
        cleaned = _INNER.sub(" ", cleaned)
    return cleaned, cleaned != text


def strip_html(text: str) -> Cleaned:
    """Remove HTML's tags, comments, scripts and styles, and decode its entities; blocks end lines.

    What looks like a tag but is not an HTML tag, such as `<T>` or `List<String>`, stays. A text that the parser cannot
    read is left as it is.
    """
    if not _MARKUP.search(text):
        return text, False
    if "<" not in text:
        cleaned = html.unescape(text)
        return cleaned, cleaned != text
    parser = _Text()
    try:
        parser.feed(text)
        parser.close()
    except AssertionError:  # The parser's answer to a broken declaration such as `<![x`.
        return text, False
    cleaned = "".join([*parser.pieces, *parser.hidden, parser.rawdata])  # The last: an unclosed script, in Python 3.11.
    return cleaned, cleaned != text


def remove_lines(text: str, unwanted: Container[str]) -> Cleaned:
    """Remove the lines whose text, blanks at both ends aside, is in `unwanted`."""
    lines = text.split("\n")
    kept = [line for line in lines if line.strip() not in unwanted]
    return "\n".join(kept), len(kept) != len(lines)


def trim(text: str, limit: int) -> Cleaned:
    """Cut a text to at most `limit` characters, at a boundary (see `text_boundaries.last_boundary`)."""
    return (text, False) if len(text) <= limit else (text[: last_boundary(text, limit)].rstrip(), True)


class _Text(HTMLParser):
    """Collects the text of a page into `pieces`; `hidden` has what stands in an element that nothing closed yet."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.hidden: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _HIDDEN:
            self._open.append(tag)
        self._mark(tag, self.get_starttag_text() or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._mark(tag, self.get_starttag_text() or "")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            del self._open[self._open.index(tag) :]
            if not self._open:
                self.hidden.clear()
        self._mark(tag, f"</{tag}>")

    def handle_data(self, data: str) -> None:
        (self.hidden if self._open else self.pieces).append(data)

    def _mark(self, tag: str, source: str) -> None:
        if tag not in _INLINE and tag not in _HIDDEN:
            self.handle_data(" " if tag in _CELLS else "\n" if tag in _BLOCKS else source)
