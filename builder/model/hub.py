"""Base checkpoints from the Hugging Face hub: which files are fetched, and one line for each way it can fail.

The hub's usual cache and its environment variables (HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN) are respected,
since its own client does the work.
"""

from __future__ import annotations

import functools
from pathlib import Path

from builder.model.checkpoint_formats import has_weights
from serving.errors import InputError

# Weights that would have to be unpickled are never fetched, and h5 only where there are no safetensors.
_SMALL = [
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("adapter_config.json", "assets/tokenizer/*"),
]
_SAFETENSORS = [
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"),
]
_H5 = ["tf_model.h5", "tf_model-*-of-*.h5", "tf_model.h5.index.json", "model.weights.h5"]


@functools.cache
def download(name: str) -> Path:
    """Return the folder of the hub's snapshot of the repository `name`, fetching what the cache lacks.

    A process asks once: a commit that comes later belongs to the next build.

    Raises InputError if the repository or its weights cannot be had, with the reason.
    """
    folder = _snapshot(name, [*_SMALL, *_SAFETENSORS])
    if not _is_whole(folder):
        folder = _snapshot(name, [*_SMALL, *_H5])
    if not _is_whole(folder):
        raise InputError(
            f"model.base {name!r}: its repository has neither model.safetensors nor tf_model.h5 (pickled weights are "
            "never fetched); convert them with transformers' save_pretrained and name that folder"
        )
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether there are weights, or an adapter, whose base is a checkpoint of its own."""
    return has_weights(folder) or (folder / "adapter_model.safetensors").is_file()


def _snapshot(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # The hub's, the network's and the cache's errors share no base.
        # Without a network the client refuses a cached snapshot that lacks any file of the repository's list, and
        # transformers fetches only one form of the tokenizer.
        cached = Path(getattr(error, "snapshot_path", None) or "")
        if (cached / "config.json").is_file() and _is_whole(cached):
            return cached
        raise InputError(f"model.base {name!r}: there is no such folder, and {_reason(error)}") from None


def _reason(error: Exception) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return "its repository on the hub is gated; accept its terms there and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such repository, or it is private; check the name, or set HF_TOKEN"
    if isinstance(error, errors.HFValidationError):
        return "it is not a name of a hub repository (ORGANIZATION/NAME) either; name a folder or a repository"
    said = (str(error).strip() or type(error).__name__).splitlines()[0].removeprefix("Got: ").rstrip(".")
    if constants.HF_HUB_OFFLINE:
        return "the hub's cache has no whole copy of it while HF_HUB_OFFLINE is set; unset it, or name a local folder"
    if isinstance(error, errors.LocalEntryNotFoundError | ConnectionError):
        return f"the hub cannot be reached ({said}) and its cache has no whole copy; name a local folder"
    return f"the hub failed ({said}); try again, or name a local folder"
