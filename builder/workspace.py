"""A run's folder: one sub-folder a stage, each stamped when it is whole, so that a killed build goes on where it was.

A stamp holds a key made of everything that decides the stage's output. A stage whose stamp has the same key is not
run again; any other state of its folder is thrown away, but for what the stage itself keeps to resume from.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from serving.errors import GPT2BundleError

STAMP = "stage.json"


def stage_key(*parts: Any) -> str:
    """SHA-256 of the parts as JSON: equal keys mean equal outputs."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run's folder for this process. Raises GPT2BundleError if another process works in it."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GPT2BundleError(
                f"another gpt2-bundle command works in {run}; wait for it, or set another name"
            ) from None
        yield


def is_done(folder: Path, key: str) -> bool:
    """Whether the stage in `folder` was finished with this key."""
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(stamp, dict) and stamp.get("key") == key


def run_stage(folder: Path, key: str, work: Callable[[Path], None], keep: tuple[str, ...] = ()) -> bool:
    """Run `work(folder)` unless the stage is done already, then stamp it; return whether it ran.

    Everything in `folder` but the names in `keep` is removed first.
    """
    if is_done(folder, key):
        return False
    clear(folder, keep)
    folder.mkdir(parents=True, exist_ok=True)
    work(folder)
    partial = folder / (STAMP + ".partial")
    partial.write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")
    partial.replace(folder / STAMP)
    return True


def clear(folder: Path, keep: tuple[str, ...] = ()) -> None:
    """Empty a stage's folder, the stamp first, so that a kill on the way cannot leave a stamp on half a stage."""
    if not folder.exists():
        return
    (folder / STAMP).unlink(missing_ok=True)
    for entry in folder.iterdir():
        if entry.name in keep:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
