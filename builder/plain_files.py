"""Files that somebody else wrote: read only where they are plain files, and refused in one line where they are not."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from serving.errors import InputError

_MAX_JSON_BYTES = 1 << 30


def is_plain(path: Path) -> bool:
    """Return whether there is a plain file at `path`; a link to one counts.

    Raises InputError for what a reader would wait on for ever or cannot read: a pipe, a socket, a device, a folder.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); mend it or name another folder") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: not a plain file; put a copy of the file itself there")
    return True


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Return the JSON object in the file `path`; `what` names its kind in errors, such as "a GPT-2 configuration".

    Raises FileNotFoundError if there is no such file, InputError for one that holds anything else.
    """
    if not is_plain(path):
        raise FileNotFoundError(str(path))
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError("it is over 1 GiB")
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}, not an object")
    except RecursionError:
        raise InputError(f"{path}: not {what} (it is nested too deeply)") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not {what} ({type(error).__name__}: {_line(error)})") from None
    return value


def read_json_if_there(path: Path, what: str) -> dict[str, Any]:
    """Return `read_json`'s object, or an empty one if there is no such file."""
    try:
        return read_json(path, what)
    except FileNotFoundError:
        return {}


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
