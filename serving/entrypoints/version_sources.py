"""Where versions come from: a bundle's folder, or a folder of bundles named by number as TensorFlow Serving has it."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from serving.bundle import MANIFEST_NAME
from serving.bundle.plain_files import read_plain
from serving.bundle.strict_json import MAX_BYTES
from serving.errors import BundleError, InputError

_NUMBER = re.compile(r"[1-9][0-9]{0,17}\Z")


@dataclass(frozen=True)
class Candidate:
    """A bundle that could be served. `version` is None where its folder has no number."""

    folder: Path
    version: int | None
    identity: str
    """Equal for what needs no loading again: the manifest's hash, or the number."""

    def signature(self) -> str:
        """Changes whenever a file in the folder does, so that what was refused is looked at again."""
        digest = hashlib.sha256(self.identity.encode())
        for folder, _, names in sorted(os.walk(self.folder)):
            for name in sorted(names):
                path = Path(folder, name)
                try:
                    status = path.lstat()
                except FileNotFoundError:
                    continue
                digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def find(folder: Path) -> list[Candidate]:
    """What is in `folder` now, the newest first; nothing if it is gone for a moment.

    A subfolder without a manifest is not finished and is left out. A version's number says it all: a change to a
    folder of the same number is not seen.
    """
    try:
        return [Candidate(folder, None, hashlib.sha256(read_plain(folder / MANIFEST_NAME, MAX_BYTES)).hexdigest())]
    except BundleError:  # Whoever opens it says what is wrong with it.
        status = (folder / MANIFEST_NAME).lstat()
        return [Candidate(folder, None, f"{status.st_ino} {status.st_mode} {status.st_size} {status.st_mtime_ns}")]
    except (FileNotFoundError, NotADirectoryError):
        pass
    try:
        numbers = [entry.name for entry in os.scandir(folder) if _NUMBER.match(entry.name) and entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    versions = sorted((int(name) for name in numbers if (folder / name / MANIFEST_NAME).is_file()), reverse=True)
    return [Candidate(folder / str(version), version, str(version)) for version in versions]


def check_source(folder: Path) -> None:
    """Raise InputError unless `folder` is a bundle or has versions."""
    if find(folder):
        return
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "there is no such folder"
        raise InputError(f"{folder}: {problem}; name the folder of a bundle, such as dist/gpt2-docs")
    raise InputError(
        f"{folder}: neither a bundle (no {MANIFEST_NAME}) nor a folder of versions (1, 2, ... with a bundle in each)"
    )
