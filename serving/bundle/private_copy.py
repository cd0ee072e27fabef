"""A copy of a part of a bundle that nobody else can change, for runtimes that read files by their paths."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from serving.bundle.folder import Bundle
from serving.bundle.plain_files import open_plain
from serving.bundle.strict_json import refuse

_BLOCK = 1 << 20


@contextlib.contextmanager
def private_copy(bundle: Bundle, folder: str) -> Iterator[Path]:
    """The files of `bundle` below `folder`, such as "savedmodel/1", in a folder of this process while the block runs.

    Each is hashed as it is copied, block by block, so what is read from there is what the manifest says, whatever
    happens to the bundle meanwhile. It lies where temporary files do (TMPDIR). Raises BundleError for a file that has
    changed since the bundle was opened.
    """
    with tempfile.TemporaryDirectory(prefix="gpt2-bundle-") as name:
        target = Path(name, folder)
        for artifact in bundle.manifest.artifacts:
            if not artifact.path.startswith(f"{folder}/"):
                continue
            copy = Path(name, artifact.path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            digest, left = hashlib.sha256(), artifact.size + 1
            try:
                opened = open_plain(bundle.path(artifact.path))
            except FileNotFoundError:
                raise refuse(str(bundle.folder), f"the file {artifact.path!r} is missing") from None
            with opened as source, copy.open("xb") as written:
                while left and (block := source.read(min(left, _BLOCK))):
                    digest.update(block)
                    written.write(block)
                    left -= len(block)
            if digest.hexdigest() != artifact.sha256:
                raise refuse(str(bundle.folder), f"the file {artifact.path!r} has changed (its SHA-256 differs)")
        yield target
