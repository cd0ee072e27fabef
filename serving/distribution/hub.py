"""Publish a bundle to a model repository of the Hugging Face hub, by the hub's own client, in one commit.

The client's environment variables (HF_TOKEN, HF_ENDPOINT, HF_HOME) and its stored login are respected. A file that
arrived before an interruption is not sent again: the hub knows large files by their SHA-256 and the others by content.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from serving.bundle import Bundle
from serving.bundle.manifest import MANIFEST_NAME, Artifact
from serving.distribution.destination import Attachment, manifest_bytes
from serving.errors import GPT2BundleError, RuntimeMissingError, cut

# What a repository may hold that its owner did not put there.
_OF_THE_HUB = {".gitattributes", ".gitignore", "README.md"}


class PublishError(GPT2BundleError):
    """A hub refused a bundle, failed or was not reached. Nothing local was changed."""


@dataclass(frozen=True)
class HubCommit:
    """The commit of a repository that holds the bundle, and whether it is new."""

    url: str
    commit: str
    changed: bool


def publish_to_hub(
    bundle: Bundle, repository: str, attachments: Sequence[Attachment] = (), *, private: bool = False
) -> HubCommit:
    """Make the repository's main branch hold the bundle's files, and attachments, and nothing else.

    A missing repository is created, with the hub's default visibility or `private`. Files are uploaded first; one
    commit then adds all and removes what is no longer in the bundle. The hub's own listing is compared with the
    manifest afterwards. Raises PublishError, with what to do, for everything that the hub or the network refuses, and
    for a repository that holds files but no bundle.
    """
    try:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    except ImportError as error:
        raise RuntimeMissingError(f"the hub needs {error.name}; run: pip install huggingface_hub") from None
    api = HfApi(library_name="gpt2-bundle")
    with _quiet(), _explained(repository):
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        repository = url.repo_id  # With the name of the user, where only NAME was given.
        before = api.model_info(repository)
        there = {file.rfilename for file in before.siblings or ()}
        if MANIFEST_NAME not in there and (strange := sorted(there - _OF_THE_HUB)):
            raise PublishError(f"hub:{repository} holds {strange[0]!r} and no bundle; choose another repository")
        artifacts = bundle.manifest.artifacts
        added = [CommitOperationAdd(artifact.path, bundle.path(artifact.path)) for artifact in artifacts]
        # A bundle has the same weights in several files. The client would send each of them.
        once = {artifact.sha256: operation for artifact, operation in zip(artifacts, added, strict=True)}
        api.preupload_lfs_files(repository, list(once.values()), free_memory=False)
        manifest = manifest_bytes(bundle)
        added.append(CommitOperationAdd(MANIFEST_NAME, manifest))
        added += [CommitOperationAdd(each.name, each.data) for each in attachments]
        removed = there - {each.path_in_repo for each in added} - {".gitattributes"}
        commit = api.create_commit(
            repository,
            [*added, *(CommitOperationDelete(path) for path in sorted(removed))],
            commit_message=f"Publish {bundle.manifest.name}",
            parent_commit=before.sha,
        )
        tree = list(api.list_repo_tree(repository, recursive=True, revision=commit.oid))
    _compare(bundle, manifest, repository, {entry.path: entry for entry in tree if hasattr(entry, "blob_id")})
    return HubCommit(str(url), commit.oid, commit.oid != before.sha)


def _compare(bundle: Bundle, manifest: bytes, repository: str, there: dict[str, Any]) -> None:
    """Raise PublishError unless each file of the bundle is in the hub's listing with its hash."""
    itself = Artifact(MANIFEST_NAME, len(manifest), hashlib.sha256(manifest).hexdigest())
    for artifact in (*bundle.manifest.artifacts, itself):
        entry = there.get(artifact.path)
        lfs = getattr(entry, "lfs", None)
        if entry is None:
            same = False
        elif lfs:
            same = (lfs.size, lfs.sha256) == (artifact.size, artifact.sha256)
        else:
            data = manifest if artifact is itself else bundle.read(artifact.path)
            same = entry.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        if not same:
            raise PublishError(
                f"hub:{repository} does not hold {artifact.path!r} as it is in the bundle; publish it again"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """The client without log lines and, where no terminal shows them, without progress bars."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("huggingface_hub")
    level, shown = logger.level, not are_progress_bars_disabled() and not sys.stderr.isatty()
    logger.setLevel(logging.ERROR)
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if shown:
            enable_progress_bars()


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turn what the client raises into a PublishError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        # An upload's own error is the cause of a general one.
        cause = error.__cause__ if type(error) is RuntimeError and isinstance(error.__cause__, Exception) else error
        if isinstance(cause, OSError) and cause.filename:
            raise cause from None
        raise PublishError(f"hub:{repository}: {_reason(cause, repository)}") from None
    except Exception as error:  # The client's HTTP library has errors that are none of these.
        if isinstance(error, GPT2BundleError):
            raise
        raise PublishError(f"hub:{repository}: {_reason(error, repository)}") from None


def _reason(error: Exception, repository: str) -> str:
    from huggingface_hub import constants, errors

    again = "run the same command again: what arrived is not sent again"
    said = cut((str(error).strip() or type(error).__name__).splitlines()[0].rstrip("."), 160)
    status = getattr(getattr(error, "response", None), "status_code", None)
    told = cut(" ".join(str(getattr(error, "server_message", None) or said).split()).rstrip("."), 160)
    if isinstance(error, errors.HFValidationError):
        return "this is not a name of a repository; write hub:ORGANIZATION/NAME"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        return "the hub does not know who asks; run 'hf auth login', or set HF_TOKEN to a token with write access"
    if status == 403:
        return f"the hub refuses ({told}); use a token that may write to {repository}"
    if status == 404:
        return f"the hub has no such organization or repository for this token ({told}); check the name and the token"
    if status in (409, 412):
        return f"the repository changed during the upload ({told}); {again}"
    if status == 429 or (status or 0) >= 500:
        return f"the hub failed ({told}); {again}"
    if status:
        return f"the hub refuses ({told})"
    if isinstance(error, ValueError):
        return f"the hub's client refuses ({said})"
    return f"the hub at {constants.ENDPOINT} cannot be reached ({said}); {again}"
