"""The one way in which files of a bundle are opened: plain files only, no link followed, never more than a bound.

A name in a folder that somebody else fills may be a pipe, which waits for ever, a device, which never ends, or a file
that grows while it is read. Standard library only.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

from serving.bundle.strict_json import refuse

_BLOCK = 1 << 20
# Without O_NONBLOCK a pipe without a writer is waited for; Windows has neither.
_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)


def open_plain(path: Path) -> BinaryIO:
    """The plain file `path`, unbuffered. Raises BundleError for anything else, and FileNotFoundError."""
    try:
        descriptor = os.open(path, _FLAGS)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EISDIR):
            raise refuse(str(path.parent), f"{path.name!r} is not a plain file") from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise refuse(str(path.parent), f"{path.name!r} is not a plain file")
        return os.fdopen(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def read_plain(path: Path, most: int) -> bytes:
    """All of the plain file `path`. Raises BundleError too if it has more than `most` bytes."""
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        # One byte more than there should be, by which a file that grows is seen.
        data = _read(file, min(size, most) + 1)
    if len(data) > most:
        raise refuse(str(path.parent), f"{path.name!r} has more than {most} bytes")
    return data


def _read(file: BinaryIO, most: int) -> bytes:
    pieces, left = [], most
    while left and (piece := file.read(min(left, 64 * _BLOCK))):
        pieces.append(piece)
        left -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def hash_plain(path: Path, most: int, sync: bool = False) -> tuple[int, str]:
    """Size in bytes and SHA-256 of a plain file, read up to about `most` bytes; with `sync`, flushed to disk too."""
    digest, size = hashlib.sha256(), 0
    with open_plain(path) as file:
        while size <= most and (block := file.read(_BLOCK)):
            digest.update(block)
            size += len(block)
        if sync:
            os.fsync(file.fileno())
    return size, digest.hexdigest()
