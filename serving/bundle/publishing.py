"""Put a finished bundle where it is looked for in one step, so that no reader ever sees half of one.

Standard library only. A process killed at any point leaves the old bundle or the new one under the final name (or, on
kernels that cannot exchange two folders, for a moment neither), plus at worst a hidden `.NAME.*` folder next to it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
from pathlib import Path

from serving.bundle.manifest import MANIFEST_NAME
from serving.bundle.strict_json import MAX_BYTES
from serving.errors import BundleError, InputError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h
# What a folder is, by the file that says so.
_KINDS = {MANIFEST_NAME: "a bundle", "deployment.json": "a deployment"}


def publish(staged: Path, destination: Path, marker: str = MANIFEST_NAME) -> Path:
    """Move the bundle in `staged` to `destination`, replacing the bundle that is there, and return the final folder.

    The step is one rename, or one exchange where a bundle exists already (renameat2, Linux); from another file system
    the files are first copied to a hidden folder next to it. `staged` and the old bundle are gone afterwards.
    A symbolic link at `destination` keeps pointing at the folder that is replaced. Raises BundleError if `staged` has
    no manifest, and InputError if `destination` holds something that is not a bundle or overlaps with `staged`.
    Other kinds of folders are known by a file of their own instead of the manifest, `marker`.
    """
    staged, final = Path(os.path.realpath(staged)), Path(os.path.realpath(destination))
    if not _is_ours(staged, marker):
        raise BundleError(f"{staged}: no {marker} of {_KINDS[marker]}, so there is nothing to publish; write it first")
    if staged == final or staged in final.parents or final in staged.parents:
        raise InputError(f"{destination}: overlaps with the folder being published, {staged}; choose another folder")
    _refuse_to_destroy(final, marker)
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        _put(staged, final)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _put_copy(staged, final)
    sync_folder(final.parent)
    # The bundle is published; what is left at `staged` is the old one, or the original of a copy.
    shutil.rmtree(staged, ignore_errors=True)
    return final


def check_destination(destination: Path, marker: str = MANIFEST_NAME) -> None:
    """Raise now for what `publish` to `destination` would raise in the end: InputError, or OSError for its folder."""
    final = Path(os.path.realpath(destination))
    _refuse_to_destroy(final, marker)
    final.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(final.parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(final.parent))


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_ours(folder: Path, marker: str) -> bool:
    """Whether `folder` has our marker, whole or damaged: other programs call a file manifest.json too."""
    path = folder / marker
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return b'"schema_version"' in file.read(MAX_BYTES)


def _refuse_to_destroy(final: Path, marker: str) -> None:
    if final.is_dir():
        if any(final.iterdir()) and not _is_ours(final, marker):
            raise InputError(
                f"{final}: the folder holds files that are not {_KINDS[marker]}; empty it or choose another folder"
            )
    elif final.exists():
        raise InputError(f"{final}: there is a file of that name; choose another folder")


def _hidden(final: Path, purpose: str) -> Path:
    return final.parent / f".{final.name}.{purpose}-{secrets.token_hex(4)}"


def _put(source: Path, final: Path) -> None:
    """Move `source` to `final` within one file system; an old bundle ends up at `source` or is removed."""
    if not (final.is_dir() and any(final.iterdir())):
        source.rename(final)  # Also replaces an empty folder.
        return
    if _exchange(source, final):
        return
    aside = _hidden(final, "old")
    final.rename(aside)
    try:
        source.rename(final)
    except BaseException:
        aside.rename(final)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _put_copy(staged: Path, final: Path) -> None:
    copy = _hidden(final, "new")
    try:
        shutil.copytree(staged, copy, symlinks=True)
        for folder, _, names in os.walk(copy):
            for name in names:
                with (Path(folder) / name).open("rb") as file:
                    os.fsync(file.fileno())
            sync_folder(Path(folder))
        _put(copy, final)
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False if the kernel, C library or file system has no such call."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    names = os.fsencode(first), os.fsencode(second)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))
