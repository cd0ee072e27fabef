"""Write a deployment's folder in one rename, and replace only a folder that deploy wrote and nobody changed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serving.bundle import Bundle
from serving.bundle.plain_files import hash_plain, read_plain
from serving.bundle.publishing import check_destination, publish
from serving.bundle.strict_json import loads
from serving.errors import BundleError, InputError

MARKER = "deployment.json"
_SCHEMA_VERSION = 2
_MARKER_BYTES = 16 << 20


def check_target(destination: Path, target: str, name: str) -> None:
    """Raise InputError if `destination` holds a deployment of another target or model, or files that deploy did not
    write as they are now."""
    final = Path(os.path.realpath(destination))
    check_destination(destination, MARKER)
    record = _record(final)
    if record is None:
        return
    old = record.get("target"), record.get("name")
    if old[0] != target or (target != "tfserving" and old[1] != name):
        raise InputError(f"{destination}: holds a {old[0]} deployment of {old[1]!r}; choose another folder")
    if target == "tfserving":
        return
    written = record.get("files")
    written = written if isinstance(written, dict) else {}
    for path in sorted(final.rglob("*")):
        place = path.relative_to(final).as_posix()
        if place == MARKER or (path.is_dir() and not path.is_symlink()):
            continue
        if path.is_symlink() or written.get(place) != hash_plain(path, path.stat().st_size)[1]:
            raise InputError(
                f"{destination}: {place} is not as deploy wrote it, and would be lost; move it or choose another folder"
            )


def _record(final: Path) -> dict[str, Any] | None:
    """What MARKER says; None if there is none, or not one that can be read, as of an older version."""
    try:
        record = loads(read_plain(final / MARKER, _MARKER_BYTES), MARKER)
    except (OSError, BundleError):
        return None
    return record if isinstance(record, dict) else None


def bundle_from(destination: Path, bundle: Bundle) -> str:
    """The bundle's folder relative to `destination`, for a compose file. Raises InputError for characters that a
    compose file would read otherwise, and for a destination inside the bundle."""
    final, folder = os.path.realpath(destination), os.path.realpath(bundle.folder)
    if Path(final).is_relative_to(folder):
        raise InputError(f"{destination}: lies inside the bundle, which may hold nothing more; choose another folder")
    relative = os.path.relpath(folder, final)
    if not re.fullmatch(r"[\w./ -]+", relative):
        raise InputError(f"{relative!r} has characters that a compose file would read otherwise; rename the folder")
    return relative


def write_folder(
    bundle: Bundle, destination: Path, target: str, texts: Mapping[str, str], copies: Mapping[str, str] | None = None
) -> Path:
    """Write `texts`, and the bundle's files in `copies` (path in the folder to path in the bundle), to `destination`.

    The folder appears in one rename or replaces, by one exchange, what deploy wrote there. Raises InputError for a
    folder that holds anything else, and for one inside the bundle.
    """
    name = bundle.manifest.name
    bundle_from(destination, bundle)
    check_target(destination, target, name)
    final = Path(os.path.realpath(destination))
    staged = final.parent / f".{final.name}.new-{secrets.token_hex(4)}"
    written = {path: hashlib.sha256(text.encode()).hexdigest() for path, text in texts.items()}
    hashes = {item.path: item.sha256 for item in bundle.manifest.artifacts}
    try:
        for path, text in texts.items():
            _place(staged / path).write_text(text, encoding="utf-8")
        for path, source in (copies or {}).items():
            shutil.copyfile(bundle.path(source), _place(staged / path))
            written[path] = hashes[source]
        record = {"schema_version": _SCHEMA_VERSION, "target": target, "name": name, "files": written}
        (staged / MARKER).write_text(json.dumps(record) + "\n", encoding="utf-8")
        return publish(staged, destination, MARKER)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _place(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
