"""Remembers small results of measurements in the user's cache folder, one file for each question.

An entry that cannot be read, or answers another question, is not an error: the caller measures again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from serving.bundle.plain_files import read_plain
from serving.bundle.strict_json import loads
from serving.errors import BundleError

_MOST = 1 << 16


def folder() -> Path | None:
    """The folder of the entries, by the XDG Base Directory Specification; None without a home folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        # The specification says that a relative path is ignored.
        root = base if base.is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return root / "gpt2-bundle" / "autotune"


def read(question: dict[str, Any]) -> Any:
    """What `write` stored for `question`, or None. The caller checks it: anyone may have written the file."""
    path = _path(question)
    if path is None:
        return None
    try:
        entry = loads(read_plain(path, _MOST), str(path))
    except (OSError, BundleError):
        return None
    return entry.get("answer") if isinstance(entry, dict) and entry.get("question") == question else None


def write(question: dict[str, Any], answer: Any) -> Path:
    """Store `answer` in one rename, so that other processes read the old entry or the new one. Raises OSError."""
    path = _path(question)
    if path is None:
        raise FileNotFoundError(0, "there is no home folder")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=".", dir=path.parent)
    draft = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"question": question, "answer": answer}, file, indent=1)
        draft.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
    return path


def _path(question: dict[str, Any]) -> Path | None:
    entries = folder()
    digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
    return None if entries is None else entries / f"{digest[:32]}.json"
