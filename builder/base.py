"""Where a model starts: a Hugging Face GPT-2 checkpoint in a local folder or on the hub, or random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from builder.recipe import ModelRecipe
from serving.bundle import Geometry
from serving.errors import InputError

# What a model needs from a hub repository; weights that would have to be unpickled are never fetched.
_HUB_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*.json", "vocab.json", "merges.txt"]


def resolve_base(name: str) -> Path:
    """Return the local folder of a base checkpoint: `name` itself if it is one, else the hub's snapshot of it.

    The hub's usual cache and its environment variables (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN) are respected. Raises
    InputError if there is neither.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or folder.exists():
        raise InputError(f"model.base {name!r}: no such folder; name a folder with config.json and model.safetensors")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # The hub's, the network's and the cache's errors share no base.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"model.base {name!r}: there is no such folder, and the hub gave no model of that name ({reason})"
        ) from None


def read_geometry(folder: Path) -> Geometry:
    """Return the geometry of the checkpoint in `folder` from its config.json.

    Raises InputError for anything that is not the GPT-2 architecture as this project builds it.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.get("model_type") != "gpt2":
            raise InputError(f"{path}: model_type is {config.get('model_type')!r}; only 'gpt2' can be read")
        width = int(config["n_embd"])
        geometry = Geometry(
            vocab_size=int(config["vocab_size"]),
            n_positions=int(config.get("n_positions") or config["n_ctx"]),
            n_embd=width,
            n_layer=int(config["n_layer"]),
            n_head=int(config["n_head"]),
            n_inner=int(config.get("n_inner") or 4 * width),
            layer_norm_epsilon=float(config.get("layer_norm_epsilon", 1e-5)),
            activation_function="gelu_new",
            bos_token_id=_token_id(config, "bos_token_id"),
            eos_token_id=_token_id(config, "eos_token_id"),
        )
    except FileNotFoundError:
        raise InputError(f"{folder}: no config.json here; name the folder of a whole GPT-2 checkpoint") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: not a GPT-2 configuration ({type(error).__name__}: {error})") from None
    for key, ours in _FIXED.items():
        if config.get(key, ours) != ours:
            raise InputError(f"{path}: {key} is {config[key]!r}; only {ours!r} can be built")
    problem = _problem(geometry)
    if problem:
        raise InputError(f"{path}: {problem}")
    return geometry


def _problem(geometry: Geometry) -> str | None:
    """What keeps the sizes of a config.json from being those of a model, or None."""
    for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
        if getattr(geometry, key) < 1:
            return f"{key} is {getattr(geometry, key)}; it must be at least 1"
    if geometry.n_embd % geometry.n_head:
        return f"n_head {geometry.n_head} does not divide n_embd {geometry.n_embd}"
    for key in ("bos_token_id", "eos_token_id"):
        if not 0 <= getattr(geometry, key) < geometry.vocab_size:
            return f"{key} is {getattr(geometry, key)}, outside of the vocabulary of {geometry.vocab_size}"
    return None


def _token_id(config: dict[str, Any], key: str) -> int:
    """A special token of config.json; where it is null or absent the last one, which the released models end with."""
    value = config.get(key)
    return int(config["vocab_size"]) - 1 if value is None else int(value)


# Switches of Hugging Face's GPT2Config that change the mathematics; the released models have them all as here.
_FIXED = {
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}


def geometry_of(model: ModelRecipe, vocab_size: int, end_token: int) -> Geometry:
    """Return the geometry that a recipe trains: the base checkpoint's, or the recipe's own with this vocabulary.

    Raises InputError for one that cannot be exported afterwards.
    """
    if model.base:
        geometry = read_geometry(resolve_base(model.base))
    else:
        if 0 < model.vocab_size < vocab_size:
            raise InputError(
                f"recipe key 'model.vocab_size' is {model.vocab_size}, but the tokenizer has {vocab_size} entries; "
                "raise it, or set it to 0"
            )
        geometry = Geometry(
            vocab_size=model.vocab_size or vocab_size,
            n_positions=model.n_positions,
            n_embd=model.n_embd,
            n_layer=model.n_layer,
            n_head=model.n_head,
            n_inner=4 * model.n_embd,
            layer_norm_epsilon=1e-5,
            activation_function="gelu_new",
            bos_token_id=end_token,
            eos_token_id=end_token,
        )
    if geometry.n_embd % (8 * geometry.n_head):
        raise InputError(
            f"model.n_embd {geometry.n_embd} over model.n_head {geometry.n_head} makes heads of "
            f"{geometry.n_embd / geometry.n_head:g}; ONNX Runtime's GroupQueryAttention takes multiples of 8 only"
        )
    return geometry


def load_weights(model: Any, folder: Path) -> None:
    """Assign the checkpoint in `folder` (model.safetensors, or shards with an index) to a Keras GPT-2.

    Names may lack the "transformer." in front, as in OpenAI's own upload. Raises InputError for a missing tensor or a
    shape that differs, by name, and for a folder with only pickled weights.
    """
    import numpy as np
    from safetensors import SafetensorError

    from builder.gpt2 import named_variables

    wanted = {name.removeprefix("transformer."): variable for name, variable in named_variables(model)}
    missing = set(wanted)
    try:
        for name, read in _tensors(folder):
            short = name.removeprefix("transformer.")
            if short not in wanted:
                continue
            array = np.asarray(read(), dtype=np.float32)
            if array.shape != tuple(wanted[short].shape):
                raise InputError(
                    f"{folder}: tensor {name!r} has shape {list(array.shape)}, but config.json makes it "
                    f"{list(wanted[short].shape)}"
                )
            wanted[short].assign(array)
            missing.discard(short)
    except SafetensorError as error:
        raise InputError(f"{folder}: its safetensors file cannot be read ({error}); fetch it again") from None
    if missing:
        raise InputError(f"{folder}: tensor {min(missing)!r} is missing ({len(missing)} in all); fetch it again")


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Give (name, function that reads the tensor) for all tensors of the folder's safetensors files."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    elif index.is_file():
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            names = sorted({Path(place).as_posix() for place in places})
        except (ValueError, TypeError, KeyError, AttributeError):
            raise InputError(f"{index}: not a safetensors index; fetch it again") from None
    elif list(folder.glob("*.bin")):
        raise InputError(
            f"{folder}: only pickled weights (.bin) here, which are never unpickled; convert them where you trust them "
            "with transformers' from_pretrained(...).save_pretrained(..., safe_serialization=True)"
        )
    else:
        raise InputError(f"{folder}: no model.safetensors here; name the folder of a whole GPT-2 checkpoint")
    for name in names:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise InputError(f"{folder}: {name!r} is named by the index but is not there; fetch it again")
        with safe_open(path, framework="np") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                yield key, lambda file=file, key=key: file.get_tensor(key)
