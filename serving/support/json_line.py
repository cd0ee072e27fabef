"""JSON for people and programs at once: text as it is, where the terminal can show it."""

from __future__ import annotations

import json
import sys
from typing import Any


def json_line(record: Any) -> str:
    """Return a record as one line of JSON, escaped only as far as standard output's encoding needs it."""
    line = json.dumps(record, ensure_ascii=False)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # A terminal in another encoding, or half a character in a file's name.
        return json.dumps(record)
    return line
