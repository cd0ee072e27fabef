"""What a build reads, by content: equal texts are equal inputs, whatever their times and however paths are spelled."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import platform
import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path

from builder.data import chinese_sentences
from builder.data.docstrings import source_files
from builder.data.sources import find_sources
from builder.recipe import CorpusRecipe

# (name, SHA-256) of each file, in the order they are read.
Inputs = list[tuple[str, str]]

# A smaller file is read faster than it is worth remembering.
_REMEMBERED_BYTES = 1 << 20
# A file that changed so recently may change again without another time or size.
_SETTLED_SECONDS = 2.0


class ContentHashes:
    """SHA-256 of files, remembered in the file `memory` for large ones that keep their size, time and inode."""

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._known: dict[str, list[int | str]] = {}
        with contextlib.suppress(OSError, ValueError):
            stored = json.loads(memory.read_text(encoding="utf-8"))
            self._known = stored if isinstance(stored, dict) else {}

    def of(self, path: Path) -> str:
        """Return the SHA-256 of a file's bytes, in hexadecimal. Raises OSError if it cannot be read."""
        status, name = path.stat(), str(path.resolve())
        seen = [status.st_size, status.st_mtime_ns, status.st_ino]
        known = self._known.get(name)
        if isinstance(known, list) and known[:3] == seen and len(known) == 4:
            return str(known[3])
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if status.st_size >= _REMEMBERED_BYTES and time.time() - status.st_mtime > _SETTLED_SECONDS:
            self._known[name] = [*seen, found]
            partial = self._memory.with_suffix(".partial")
            with contextlib.suppress(OSError):  # It is a memory only: without it the file is read once more.
                partial.write_text(json.dumps(self._known) + "\n", encoding="utf-8")
                partial.replace(self._memory)
        return found

    def all_of(self, files: Iterable[tuple[str, Path]]) -> Inputs:
        """Return (name, SHA-256) of each (name, path)."""
        return [(name, self.of(path)) for name, path in files]


def corpus_inputs(recipe: CorpusRecipe, hashes: ContentHashes) -> Inputs:
    """Return what a recipe's corpus consists of: its files, or the sources of a builtin text.

    Raises what `find_sources` does.
    """
    if not recipe.paths and recipe.builtin == "chinese":
        return hashes.all_of([("chinese", Path(chinese_sentences.__file__))])
    if not recipe.paths:
        return [("docstrings", _library_hash())]
    return hashes.all_of((file.name, file.path) for file in find_sources(recipe.paths).files)


@functools.cache
def _library_hash() -> str:
    """Of the standard library's sources, and of the Python that parses them."""
    root = Path(sysconfig.get_path("stdlib"))
    digest = hashlib.sha256(platform.python_version().encode())
    for path in source_files(root):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
