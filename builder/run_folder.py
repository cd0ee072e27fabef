"""A run's folder: one sub-folder a stage, each stamped when it is whole, so that an interrupted build resumes.

A stamp holds a key made of everything that decides the stage's output, and the sizes of the files that came of it. A
stage whose stamp has the same key, and whose files have these sizes, is not run again; any other state of its folder
is removed, except for what the stage itself keeps to resume from.

Only what a stage wrote is removed: its folder has a marker, which a folder with other files never gets, and each
stage names what it writes there. A folder with anything else in it, or one that is a link, is refused.
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
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from serving.errors import GPT2BundleError, InputError

STAMP, MARKER = "stage.json", ".stage"
_MARK = "A stage of gpt2-bundle keeps its work in this folder and empties it; keep nothing of your own here.\n"


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
    stamp = _stamp(folder)
    try:
        return stamp["key"] == key and all(
            (folder / name).stat().st_size == size for name, size in stamp["files"].items()
        )
    except (OSError, KeyError, AttributeError):
        return False


def run_stage(
    folder: Path,
    key: str,
    work: Callable[[Path], None],
    *,
    writes: tuple[str, ...],
    keep: tuple[str, ...] = (),
    parts: tuple[str, ...] = (),
) -> bool:
    """Run `work(folder)` unless the stage is done already, then stamp it; return whether it ran.

    `writes` are the names, or patterns of names, that `work` gives what it leaves in `folder`. They are removed first.
    The names in `keep` and `parts` are not: `keep` is not part of the stage's output; `parts` is, and `work` itself
    reuses what it finds there or makes it again. Raises InputError as `refuse_strangers` does.
    """
    if is_done(folder, key):
        return False
    clear(folder, writes, keep + parts)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text(_MARK, encoding="utf-8")
    with refusals_named(folder):
        work(folder)
    partial = folder / (STAMP + ".partial")
    stamp = {"key": key, "files": _sizes(folder, keep)}
    partial.write_text(json.dumps(stamp) + "\n", encoding="utf-8")
    partial.replace(folder / STAMP)
    return True


def refuse_strangers(folder: Path, writes: tuple[str, ...], kept: tuple[str, ...] = ()) -> None:
    """Raise InputError if emptying a stage's folder could remove what the stage did not write.

    That is a folder that is a link, one with anything in it and no marker, and one with anything of another name than
    in `writes` and `kept`, or that is not among the files of its stamp.
    """
    if folder.is_symlink():
        raise InputError(
            f"{folder}: a link, and a stage empties its folder; remove the link (the whole run's folder may be one)"
        )
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder}: a file where a stage keeps its work; move it away")
    found = _strangers(folder, writes, kept)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise InputError(
            f"{folder}: {', '.join(found[:3])}{more} did not come from this stage, which empties its folder; move that "
            "away, or set another name or --runs"
        )


def _strangers(folder: Path, writes: tuple[str, ...], kept: tuple[str, ...]) -> list[str]:
    own = (*writes, *kept, MARKER, STAMP, STAMP + ".partial")
    entries = sorted(folder.iterdir())
    stamp = _stamp(folder)
    if not stamp and not (folder / MARKER).is_file():
        return [entry.name for entry in entries]
    strangers = [
        entry.name
        for entry in entries
        if (entry.is_symlink() and entry.name not in kept) or not any(fnmatchcase(entry.name, name) for name in own)
    ]
    if stamp and not strangers:
        stamped = stamp.get("files", {})
        strangers = [name for name in _sizes(folder, kept) if name not in stamped and name not in own]
    return strangers


def _stamp(folder: Path) -> dict[str, Any]:
    """What the stamp in a folder says; nothing if there is none or it is broken."""
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def _sizes(folder: Path, keep: tuple[str, ...]) -> dict[str, int]:
    own = (*keep, MARKER)
    paths = [path for path in folder.rglob("*") if path.relative_to(folder).parts[0] not in own and path.is_file()]
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


def clear(folder: Path, writes: tuple[str, ...], keep: tuple[str, ...] = ()) -> None:
    """Empty a stage's folder, the stamp first, so that a kill on the way cannot leave a stamp on half a stage.

    Raises InputError as `refuse_strangers` does, before anything is removed.
    """
    refuse_strangers(folder, writes, keep)
    if not folder.exists():
        return
    (folder / STAMP).unlink(missing_ok=True)
    for entry in folder.iterdir():
        if entry.name in (*keep, MARKER):
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
