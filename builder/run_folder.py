"""A run's folder: one sub-folder a stage, each stamped when it is whole, so that a killed build goes on where it was.

A stamp holds a key made of everything that decides the stage's output, and the sizes of the files that came of it. A
stage whose stamp has the same key, and whose files have these sizes, is not run again; any other state of its folder
is thrown away, but for what the stage itself keeps to resume from.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
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
    """Whether the stage in `folder` was finished with this key, and its files still have their sizes."""
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        if not isinstance(stamp, dict) or stamp.get("key") != key:
            return False
        return all((folder / name).stat().st_size == size for name, size in stamp["files"].items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def run_stage(
    folder: Path, key: str, work: Callable[[Path], None], keep: tuple[str, ...] = (), parts: tuple[str, ...] = ()
) -> bool:
    """Run `work(folder)` unless the stage is done already, then stamp it; return whether it ran.

    Everything in `folder` but the names in `keep` and `parts` is removed first. `keep` is no part of the stage's
    output; `parts` is, and `work` itself takes over what it finds there or makes it anew.
    """
    if is_done(folder, key):
        return False
    clear(folder, keep + parts)
    folder.mkdir(parents=True, exist_ok=True)
    with refusals_named(folder):
        work(folder)
    partial = folder / (STAMP + ".partial")
    stamp = {"key": key, "files": _sizes(folder, keep)}
    partial.write_text(json.dumps(stamp) + "\n", encoding="utf-8")
    partial.replace(folder / STAMP)
    return True


def _sizes(folder: Path, keep: tuple[str, ...]) -> dict[str, int]:
    paths = [path for path in folder.rglob("*") if path.relative_to(folder).parts[0] not in keep and path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(paths)}


@contextlib.contextmanager
def refusals_named(folder: Path) -> Iterator[None]:
    """Raise what the file system refuses in the block as OSError with a name, `folder` where there is no better one.

    A full disk comes without a name from a plain write, as a list from a copy, and in errors of their own from
    safetensors and TensorFlow.
    """
    try:
        yield
    except GPT2BundleError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = error.filename or str(folder)
            raise
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(folder)) from error
        raise


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
