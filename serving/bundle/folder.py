"""The contract between builder and serving: a folder whose manifest names every file in it, with size and hash.

Standard library only. The builder fills a folder, calls `write_manifest` and then `publish`; everything else calls
`open_bundle` and reads files only through `Bundle.path`. A bundle holds plain files and folders, no symbolic links,
and nothing that its manifest does not name, so what was hashed is what is served.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from serving.bundle.manifest import (
    MANIFEST_NAME,
    MAX_ARTIFACTS,
    MAX_FILE_BYTES,
    SCHEMA_VERSION,
    TOKENIZER_NAME,
    Artifact,
    Geometry,
    Graph,
    Manifest,
    Provenance,
    TokenizerFiles,
    from_json,
    path_problem,
    to_json,
)
from serving.bundle.plain_files import hash_plain, read_plain
from serving.bundle.publishing import sync_folder
from serving.bundle.strict_json import MAX_BYTES, refuse
from serving.errors import BundleError, InputError
from serving.support.suggestions import did_you_mean

TOKENIZER_FILES = (
    TOKENIZER_NAME,
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
_UNFINISHED_NAME = ".manifest.json.unfinished"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its manifest, checked against each other."""

    folder: Path
    manifest: Manifest

    @cached_property
    def _paths(self) -> frozenset[str]:
        return frozenset(artifact.path for artifact in self.manifest.artifacts)

    def path(self, name: str) -> Path:
        """The file `name`, a path that the manifest names such as "tokenizer.json".

        Raises BundleError for any other name, so that nothing outside the checked files is ever opened.
        """
        if name not in self._paths:
            raise BundleError(f"{self.folder}: the bundle has no file {name!r}{did_you_mean(name, self._paths)}")
        return self.folder / name

    def read(self, name: str, most: int = MAX_FILE_BYTES) -> bytes:
        """The bytes of the file `name`, at most `most`, in private memory, and hashed there.

        Raises BundleError if they are not those of the manifest, as `path` does for a name that it does not have.
        """
        path = self.path(name)
        (artifact,) = (each for each in self.manifest.artifacts if each.path == name)
        if artifact.size > most:
            raise refuse(str(self.folder), f"the file {name!r} has {artifact.size} bytes; it may have {most}")
        try:
            data = read_plain(path, artifact.size)
        except FileNotFoundError:
            raise refuse(str(self.folder), f"the file {name!r} is missing") from None
        if hashlib.sha256(data).hexdigest() != artifact.sha256:
            raise _changed(self.folder, artifact)
        return data

    def graph(self, name: str) -> Graph:
        """The graph `name`, such as "ort/fp32". Raises InputError, naming the nearest one, if there is none."""
        try:
            return self.manifest.graphs[name]
        except KeyError:
            known = did_you_mean(name, self.manifest.graphs)
            raise InputError(f"{self.folder}: the bundle has no graph {name!r}{known}") from None

    def graph_size(self, name: str) -> int:
        """Bytes of everything in the folder of graph `name`: its main file and the weights next to and below it."""
        folder = self.graph(name).path.rpartition("/")[0]
        inside = [item.size for item in self.manifest.artifacts if not folder or item.path.startswith(folder + "/")]
        return sum(inside)


def write_manifest(
    folder: Path,
    *,
    name: str,
    model: Geometry,
    graphs: Mapping[str, Graph],
    provenance: Provenance,
    quality: Mapping[str, float],
    parity: Mapping[str, Any],
    created: str | None = None,
) -> Manifest:
    """Hash every file in `folder`, then write `folder`/manifest.json, and return the manifest as it will be read.

    All files and the folders that hold them are flushed to disk first; the manifest replaces an older one atomically
    and last, so a folder with a manifest is whole. `created` defaults to the time in SOURCE_DATE_EPOCH (seconds since
    1970), or to now. Raises BundleError for whatever `open_bundle` would refuse: a symbolic link, an impossible file
    name, no tokenizer.json, a value out of range.
    """
    target = folder / MANIFEST_NAME
    unfinished = folder / _UNFINISHED_NAME
    unfinished.unlink(missing_ok=True)
    found = sorted(path for path in _files(folder) if path != MANIFEST_NAME)
    for path in found:
        problem = path_problem(path)
        if problem:
            raise BundleError(f"{folder}: the file name {path!r} {problem}; rename it")
    artifacts = tuple(_artifact(folder, path, sync=True) for path in found)
    hashes = {artifact.path: artifact.sha256 for artifact in artifacts}
    if TOKENIZER_NAME not in hashes:
        raise BundleError(f"{folder}: {TOKENIZER_NAME} is missing; write the tokenizer before the manifest")
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        created=created or _now().strftime("%Y-%m-%dT%H:%M:%SZ"),
        model=model,
        tokenizer=TokenizerFiles(
            id=f"sha256:{hashes[TOKENIZER_NAME]}", files=tuple(path for path in TOKENIZER_FILES if path in hashes)
        ),
        artifacts=artifacts,
        graphs=dict(graphs),
        provenance=provenance,
        quality=dict(quality),
        parity=dict(parity),
    )
    data = to_json(manifest).encode("utf-8", "surrogatepass")
    # Read back before it is written: the reader's rules are the only rules there are.
    manifest = from_json(data, str(target))
    for inner in {folder / path.rpartition("/")[0] for path in hashes}:
        sync_folder(inner)
    try:
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    sync_folder(folder)
    return manifest


def _now() -> datetime:
    """The present, or the time that reproducible builds agree on (reproducible-builds.org, SOURCE_DATE_EPOCH)."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        return datetime.now(UTC) if epoch is None else datetime.fromtimestamp(int(epoch), UTC)
    except (ValueError, OverflowError, OSError):
        raise InputError(f"SOURCE_DATE_EPOCH is {epoch!r}; set it to seconds since 1970, or unset it") from None


def open_bundle(folder: Path | str, check: Literal["hashes", "sizes"] = "hashes") -> Bundle:
    """Open the bundle in `folder`, or refuse it with the name of the first file that is not as the manifest says.

    `check` "hashes" reads every byte; "sizes" only asks the file system. Raises InputError if `folder` is not a folder,
    and BundleError for a missing or malformed manifest, a file that is missing, unnamed by the manifest (hidden files
    too), not a plain file, or of another size or SHA-256.
    """
    folder = Path(folder)
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "there is no such folder"
        raise InputError(f"{folder}: {problem}; name the folder of a bundle, such as dist/gpt2-docs")
    manifest = from_json(_read_manifest(folder), str(folder / MANIFEST_NAME))
    found = _files(folder)
    for artifact in manifest.artifacts:
        if artifact.path not in found:
            raise refuse(str(folder), f"the file {artifact.path!r} is missing")
        if found[artifact.path] != artifact.size:
            raise refuse(
                str(folder), f"the file {artifact.path!r} has {found[artifact.path]} bytes instead of {artifact.size}"
            )
    unnamed = sorted(found.keys() - {artifact.path for artifact in manifest.artifacts} - {MANIFEST_NAME})
    if unnamed:
        more = f" and {len(unnamed) - 1} more" if len(unnamed) > 1 else ""
        raise BundleError(f"{folder}: the file {unnamed[0]!r}{more} is not in the manifest; move it elsewhere")
    if check == "hashes":
        for artifact in manifest.artifacts:
            if _artifact(folder, artifact.path, artifact.size) != artifact:
                raise _changed(folder, artifact)
    return Bundle(folder, manifest)


def _changed(folder: Path, artifact: Artifact) -> BundleError:
    return refuse(str(folder), f"the file {artifact.path!r} has changed (its SHA-256 differs)")


def _read_manifest(folder: Path) -> bytes:
    try:
        return read_plain(folder / MANIFEST_NAME, MAX_BYTES)
    except FileNotFoundError:
        raise BundleError(
            f"{folder}: no {MANIFEST_NAME}, so this is not a bundle; make one with 'gpt2-bundle build'"
        ) from None


def _files(folder: Path) -> dict[str, int]:
    """Size in bytes of every file below `folder`, by relative POSIX path. Raises BundleError for anything else."""
    found: dict[str, int] = {}
    for entry in _walk(folder):
        path = Path(entry.path).relative_to(folder).as_posix()
        status = entry.stat(follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode):
            kind = "a symbolic link" if entry.is_symlink() else "not a plain file"
            raise BundleError(f"{folder}: {path!r} is {kind}; a bundle holds plain files only, so put a copy there")
        found[path] = status.st_size
    return found


def _walk(folder: Path) -> Iterator[os.DirEntry[str]]:
    pending, seen = [os.fspath(folder)], 0
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                seen += 1
                if seen > 2 * MAX_ARTIFACTS:
                    raise BundleError(
                        f"{folder}: more than {2 * MAX_ARTIFACTS} files and folders; this is not a bundle"
                    )
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                else:
                    yield entry


def _artifact(folder: Path, path: str, most: int = MAX_FILE_BYTES, sync: bool = False) -> Artifact:
    """Size and hash of one file, read in blocks up to `most` bytes; with `sync`, also flush it to disk."""
    try:
        size, sha256 = hash_plain(folder / path, most, sync)
    except FileNotFoundError:
        raise refuse(str(folder), f"the file {path!r} vanished while it was read") from None
    return Artifact(path=path, size=size, sha256=sha256)
