"""Write a bundle into an OCI image layout on disk, as an artifact that ORAS and other OCI tools read.

Each file is one layer, named by the annotation org.opencontainers.image.title as ORAS names files. Digests depend on
the bundle alone. Specifications: OCI image 1.1, "Image Layout", "Image Manifest" and its guidelines for artifacts.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from serving.bundle import Bundle
from serving.bundle.manifest import MANIFEST_NAME
from serving.bundle.plain_files import hash_plain, open_plain, read_plain
from serving.bundle.publishing import sync_folder
from serving.bundle.strict_json import MAX_BYTES
from serving.distribution.destination import Attachment, manifest_bytes, refuse_inside
from serving.errors import BundleError, InputError

ARTIFACT_TYPE = "application/vnd.gpt2-bundle.bundle.v1"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
TITLE, CREATED, REF_NAME = (f"org.opencontainers.image.{name}" for name in ("title", "created", "ref.name"))
_LAYOUT = {"imageLayoutVersion": "1.0.0"}
_TYPES = {".json": "application/json", ".md": "text/markdown", ".txt": "text/plain"}
_BLOCK = 1 << 20
_UNFINISHED = ".unfinished-"

Descriptor = dict[str, Any]


@dataclass(frozen=True)
class WrittenLayout:
    """A bundle in a layout: the digest of its manifest, its bytes, and how many of them were there already."""

    folder: Path
    tag: str
    digest: str
    size: int
    reused: int


def write_layout(bundle: Bundle, folder: Path, tag: str, attachments: Sequence[Attachment] = ()) -> WrittenLayout:
    """Add `bundle` to the layout in `folder` under `tag`; a new layout is made where the folder is missing or empty.

    index.json is replaced last and in one step, so an interrupted call leaves the old tags; the next call keeps the
    blobs that are whole. Attachments refer to the bundle by `subject`. Raises InputError for a folder that holds
    anything else or that another process writes to, and BundleError if a file of the bundle changes meanwhile.
    """
    refuse_inside(bundle, folder)
    with _locked(folder):
        index = _index(folder)
        blobs = _Blobs(folder / "blobs" / "sha256")
        layers = [
            blobs.add_file(bundle.folder / artifact.path, artifact.path, artifact.sha256, artifact.size)
            for artifact in bundle.manifest.artifacts
        ]
        layers.append(_titled(blobs.add(manifest_bytes(bundle), "application/json"), MANIFEST_NAME))
        notes = {TITLE: bundle.manifest.name, CREATED: bundle.manifest.created}
        written = blobs.add_manifest(ARTIFACT_TYPE, layers, {"annotations": notes})
        entries = [{**written, "artifactType": ARTIFACT_TYPE, "annotations": {REF_NAME: tag}}]
        for each in attachments:
            layer = _titled(blobs.add(each.data, each.media_type), each.name)
            more = {"subject": written, "annotations": {CREATED: bundle.manifest.created}}
            referrer = blobs.add_manifest(each.media_type, [layer], more)
            entries.append({**referrer, "artifactType": each.media_type})
        _replace(folder / "oci-layout", _LAYOUT)
        sync_folder(blobs.folder)
        _replace(folder / "index.json", _with(index, entries, tag))
        sync_folder(folder)
    return WrittenLayout(folder, tag, written["digest"], blobs.size, blobs.reused)


class _Blobs:
    """The folder of a layout's blobs; counts the bytes that are asked for and those that were there."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{_UNFINISHED}*"):
            left.unlink()
        self.folder, self.size, self.reused = folder, 0, 0
        self._seen: set[str] = set()

    def add(self, data: bytes, media_type: str) -> Descriptor:
        digest = hashlib.sha256(data).hexdigest()
        if not self._has(digest, len(data)):
            with self._unfinished() as path, path.open("wb") as file:
                file.write(data)
                self._finish(file, path, digest)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    def add_file(self, source: Path, title: str, digest: str, size: int) -> Descriptor:
        """Copy a file of the bundle and hash it meanwhile. Raises BundleError if it is not as the manifest says."""
        if not self._has(digest, size):
            found = hashlib.sha256()
            with self._unfinished() as path, open_plain(source) as reader, path.open("wb") as file:
                while block := reader.read(_BLOCK):
                    found.update(block)
                    file.write(block)
                if found.hexdigest() != digest:
                    raise BundleError(f"{source}: the file has changed (its SHA-256 differs); open the bundle again")
                self._finish(file, path, digest)
        kind = _TYPES.get(source.suffix, "application/octet-stream")
        return _titled({"mediaType": kind, "digest": f"sha256:{digest}", "size": size}, title)

    def add_manifest(self, artifact_type: str, layers: list[Descriptor], more: dict[str, Any]) -> Descriptor:
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": artifact_type,
            "config": self.add(b"{}", EMPTY_TYPE),
            "layers": layers,
            **more,
        }
        return self.add(_json(manifest), MANIFEST_TYPE)

    def _has(self, digest: str, size: int) -> bool:
        """Whether the blob is there and whole; a damaged one is written again."""
        if digest in self._seen:
            return True
        self._seen.add(digest)
        self.size += size
        path = self.folder / digest
        if not path.is_file() or path.is_symlink() or hash_plain(path, size) != (size, digest):
            return False
        self.reused += size
        return True

    @contextmanager
    def _unfinished(self) -> Iterator[Path]:
        path = self.folder / f"{_UNFINISHED}{secrets.token_hex(4)}"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _finish(self, file: BinaryIO, path: Path, digest: str) -> None:
        file.flush()
        os.fsync(file.fileno())
        path.replace(self.folder / digest)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The layout's folder, which no second process writes to meanwhile."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is not a folder; choose another place for the layout")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "oci-layout").is_file():
        # An interrupted call may have left blobs alone.
        strange = {path.name for path in folder.iterdir() if not path.name.startswith(_UNFINISHED)} - {"blobs"}
        if strange or any(path.name != "sha256" for path in (folder / "blobs").iterdir()):
            raise InputError(f"{folder}: holds files and is not an OCI image layout; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another process writes to this layout; wait for its end") from None
        yield
    finally:
        os.close(descriptor)


def _index(folder: Path) -> dict[str, Any]:
    """The layout's index.json, or an empty one. Raises InputError for what is not version 1 of a layout."""
    index: Any = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": []}
    version: Any = _LAYOUT
    try:
        if (folder / "oci-layout").exists():
            version = json.loads(read_plain(folder / "oci-layout", MAX_BYTES))
        if (folder / "index.json").exists():
            index = json.loads(read_plain(folder / "index.json", MAX_BYTES))
    except (ValueError, RecursionError, BundleError):
        index = None
    manifests = index.get("manifests") if isinstance(index, dict) else None
    if (
        not isinstance(version, dict)
        or version.get("imageLayoutVersion") != _LAYOUT["imageLayoutVersion"]
        or not isinstance(manifests, list)
        or not all(isinstance(each, dict) for each in manifests)
    ):
        raise InputError(f"{folder}: its index.json or oci-layout cannot be read; choose another folder")
    return dict(index)


def _with(index: dict[str, Any], entries: list[Descriptor], tag: str) -> dict[str, Any]:
    """`index` with `entries` in the place of those of the same tag or the same digest."""
    digests = {entry["digest"] for entry in entries if REF_NAME not in entry.get("annotations", {})}
    kept = [
        each
        for each in index["manifests"]
        if each.get("digest") not in digests and (each.get("annotations") or {}).get(REF_NAME) != tag
    ]
    return {**index, "manifests": [*kept, *entries]}


def _titled(descriptor: Descriptor, title: str) -> Descriptor:
    return {**descriptor, "annotations": {TITLE: title}}


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _replace(path: Path, value: Any) -> None:
    unfinished = path.with_name(f"{_UNFINISHED}{path.name}")
    try:
        with unfinished.open("wb") as file:
            file.write(_json(value))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
