"""Versions of a served model: a new one is put next to the old one in one rename. Standard library only.

TensorFlow Serving lists a model's folder and takes every name that is a number for a version. So a version gets its
number when all its files are there, and loses it before the first of them goes.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

from serving.bundle import Artifact, Bundle
from serving.bundle.publishing import sync_folder
from serving.errors import BundleError, InputError

SAVED_MODEL = "savedmodel/1/"


def saved_model_files(bundle: Bundle) -> list[Artifact]:
    """The files of the bundle's SavedModel. Raises BundleError if it has none."""
    files = [item for item in bundle.manifest.artifacts if item.path.startswith(SAVED_MODEL)]
    if f"{SAVED_MODEL}saved_model.pb" not in {item.path for item in files}:
        raise BundleError(f"{bundle.folder}: the bundle has no SavedModel; build it again")
    return files


def digest(files: Iterable[Artifact]) -> str:
    """SHA-256 of names and contents, as the manifest says them."""
    lines = sorted(f"{item.sha256} {item.path}\n" for item in files)
    return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()


def versions_in(model: Path) -> list[int]:
    """Numbers of the versions in the folder `model`, ascending; none if there is no such folder."""
    try:
        names = [entry.name for entry in os.scandir(model) if entry.is_dir()]
    except FileNotFoundError:
        return []
    # As the server reads them: 007 is version 7 too.
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal())


def add_version(bundle: Bundle, files: Iterable[Artifact], model: Path, version: int) -> None:
    """Copy the SavedModel to `model`/`version`, which appears whole. Raises InputError if it is there already."""
    model.mkdir(parents=True, exist_ok=True)
    staged = model / f".{version}.new-{secrets.token_hex(4)}"
    try:
        for item in files:
            target = staged / item.path.removeprefix(SAVED_MODEL)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path(item.path), target)
        try:
            staged.rename(model / str(version))
        except OSError:
            if (model / str(version)).exists():
                raise InputError(f"{model}: another program has just added version {version}; run this again") from None
            raise
        sync_folder(model)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def prune(model: Path, keep: int) -> list[int]:
    """Remove all but the newest `keep` versions, and what an interrupted run left; return the numbers removed."""
    removed = versions_in(model)[:-keep]
    for version in removed:
        for folder in [each for each in model.iterdir() if each.name.isdecimal() and int(each.name) == version]:
            folder.rename(model / f".{version}.old-{secrets.token_hex(4)}")
    for folder in model.iterdir():
        if folder.name.startswith(".") and (".new-" in folder.name or ".old-" in folder.name):
            shutil.rmtree(folder, ignore_errors=True)
    return removed
