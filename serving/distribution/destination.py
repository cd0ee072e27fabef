"""What a bundle is published to, and the files that are published with it."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from pathlib import Path

from serving.bundle import Bundle
from serving.bundle.manifest import MANIFEST_NAME
from serving.bundle.plain_files import hash_plain, read_plain
from serving.bundle.strict_json import MAX_BYTES
from serving.distribution.bill_of_materials import bill_of_materials
from serving.errors import BundleError, InputError

TAG = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"  # OCI distribution specification, "Pulling manifests".
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?\Z")
_ATTACHED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
SIGNATURE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
MATERIALS_TYPE = "application/vnd.cyclonedx+json"


@dataclass(frozen=True)
class HubDestination:
    """A model repository of the Hugging Face hub, ORGANIZATION/NAME."""

    repository: str


@dataclass(frozen=True)
class LayoutDestination:
    """A tag of an OCI image layout on disk."""

    folder: Path
    tag: str


@dataclass(frozen=True)
class Attachment:
    """A signature or a bill of materials of the bundle: its file name, media type and bytes."""

    name: str
    media_type: str
    data: bytes


def destination_of(text: str) -> HubDestination | LayoutDestination:
    """Parse `hub:ORGANIZATION/NAME` or `oci:FOLDER[:TAG]`; the default tag is "latest". Raises InputError."""
    kind, _, place = text.partition(":")
    if kind == "hub" and _REPOSITORY.match(place):
        return HubDestination(place)
    if kind == "oci" and place:
        folder, colon, tag = place.rpartition(":")
        if not colon or "/" in tag:
            folder, tag = place, "latest"
        if folder and re.fullmatch(TAG, tag):
            return LayoutDestination(Path(folder), tag)
        raise InputError(f"{text!r} has no folder or no tag of letters, digits, '.', '_' and '-'; write oci:FOLDER:TAG")
    raise InputError(f"{text!r} is not a destination; write hub:ORGANIZATION/NAME or oci:FOLDER:TAG")


def attachment(bundle: Bundle, path: Path) -> Attachment:
    """Read a file made by `sign` or `sbom`. Raises InputError unless it belongs to this bundle.

    A signature is compared by the hashes that it covers; its key is checked by `verify-signature` only.
    """
    if not _ATTACHED_NAME.match(path.name) or path.name in {MANIFEST_NAME, *_top_names(bundle)}:
        raise InputError(f"{path}: the name is one of the bundle's files, or has other signs than letters and digits")
    try:
        data = read_plain(path, MAX_BYTES)
        content = json.loads(data)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict) and content.get("bomFormat") == "CycloneDX":
        if data.decode("utf-8", "replace") != bill_of_materials(bundle):
            raise InputError(f"{path}: is the bill of materials of another bundle; write it with 'gpt2-bundle sbom'")
        return Attachment(path.name, MATERIALS_TYPE, data)
    if isinstance(content, dict) and content.get("mediaType") == SIGNATURE_TYPE:
        if signed_hashes(content) != file_hashes(bundle):
            raise InputError(f"{path}: is the signature of another bundle; make it with 'gpt2-bundle sign'")
        return Attachment(path.name, SIGNATURE_TYPE, data)
    raise InputError(f"{path}: is neither a signature nor a bill of materials of a bundle")


def signed_hashes(signature: object) -> dict[str, str] | None:
    """SHA-256 of each file by path, as the statement of a signature has them; None if it is no such statement.

    The signature itself is not checked here.
    """
    try:
        payload = signature["dsseEnvelope"]["payload"]  # type: ignore[index]
        resources = json.loads(base64.b64decode(payload, validate=True))["predicate"]["resources"]
        return {str(each["name"]): str(each["digest"]) for each in resources}
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def file_hashes(bundle: Bundle) -> dict[str, str]:
    """SHA-256 of every file of the bundle by path, manifest.json too."""
    hashes = {artifact.path: artifact.sha256 for artifact in bundle.manifest.artifacts}
    return hashes | {MANIFEST_NAME: hash_plain(bundle.folder / MANIFEST_NAME, MAX_BYTES)[1]}


def refuse_inside(bundle: Bundle, path: Path) -> None:
    """Raise InputError for a path in the bundle's folder, which may hold nothing that its manifest does not name."""
    if Path(path).resolve().is_relative_to(bundle.folder.resolve()):
        raise InputError(f"{path}: lies inside the bundle, which may hold nothing more; choose another folder")


def manifest_bytes(bundle: Bundle) -> bytes:
    """The bytes of manifest.json. Raises BundleError if the file is gone or is not a plain file."""
    try:
        return read_plain(bundle.folder / MANIFEST_NAME, MAX_BYTES)
    except FileNotFoundError:
        raise BundleError(f"{bundle.folder}: {MANIFEST_NAME} vanished while it was read") from None


def _top_names(bundle: Bundle) -> set[str]:
    return {artifact.path.partition("/")[0] for artifact in bundle.manifest.artifacts}
