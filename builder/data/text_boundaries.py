"""Where a text may be cut: at a line's end, a sentence's, a word's, and never inside a character.

A character is what a reader sees as one: a letter with its accents, an emoji with its modifiers.
"""

from __future__ import annotations

import re
import unicodedata

# A full stop of a script that puts no space after it ends a sentence wherever it stands; a Latin one needs a space.
_CLOSING = "\"'”’»)\\]」』）】》〉"
_SENTENCE = re.compile(rf"(?:[。！？；…][{_CLOSING}]*|[.!?][{_CLOSING}]*(?=\s))(?![。！？；….!?{_CLOSING}])")
_CJK_SENTENCE = re.compile(rf"[。！？…][{_CLOSING}]*(?![。！？…{_CLOSING}])")
_BLANK = re.compile(r"(?<=\S)(?=\s)")
# How far from the wanted place a better kind of boundary is looked for.
_REACH = 4096
_JOINER = "\u200d"


def nearest_boundary(text: str, target: int, low: int, high: int) -> int:
    """Return the place in [low, high] to cut a text at, near `target`, or 0 if there is none.

    The kinds of boundary in order: after a line end, after a sentence, before white space, between two characters. Both
    sides of the cut hold more than white space.
    """
    low, high = max(low, len(text) - len(text.lstrip()) + 1), min(high, len(text.rstrip()) - 1)
    if low > high:
        return 0
    target = min(max(target, low), high)
    lines = text.rfind("\n", low - 1, target) + 1, text.find("\n", target, high) + 1
    found = [cut for cut in lines if low <= cut <= high]
    if found:
        return min(found, key=lambda cut: abs(cut - target))
    begin, end = max(low, target - _REACH), min(high, target + _REACH)
    for kind in (_SENTENCE, _BLANK):
        # A match may need to see what follows the last place.
        cuts = [match.end() for match in kind.finditer(text, max(0, begin - 1), min(len(text), end + 2))]
        cuts = [cut for cut in cuts if begin <= cut <= end]
        if cuts:
            return min(cuts, key=lambda cut: abs(cut - target))
    return next((cut for cut in range(target, high + 1) if is_character_boundary(text, cut)), 0)


def last_boundary(text: str, limit: int) -> int:
    """Return the last place to cut a text at, so that at most `limit` characters are left.

    The kinds of boundary in order: a line end in the second half of what is left, a sentence's end of a script without
    spaces or a blank there, the end of a character.
    """
    half = limit // 2
    cut = text.rfind("\n", half, limit)
    if cut > 0:
        return cut
    sentences = [match.end() for match in _CJK_SENTENCE.finditer(text, half, min(len(text), limit + 1))]
    cut = max((end for end in sentences if end <= limit), default=0)
    if cut > 0 or text[limit : limit + 1].isspace():
        return cut or limit
    cut = max(text.rfind(blank, half, limit) for blank in " \t\u3000")
    if cut > 0:
        return cut
    return next((place for place in range(limit, half, -1) if is_character_boundary(text, place)), limit)


def is_character_boundary(text: str, place: int) -> bool:
    """Return whether no character that a reader sees spans a place in a text."""
    if not 0 < place < len(text):
        return True
    after = text[place]
    if after == _JOINER or text[place - 1] == _JOINER or text[place - 1 : place + 1] == "\r\n":
        return False
    # Marks, variation selectors (which are marks) and the modifiers of emoji belong to what precedes them.
    return not unicodedata.category(after).startswith("M") and not "\U0001f3fb" <= after <= "\U0001f3ff"
