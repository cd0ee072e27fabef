"""The sizes of a model: read from a checkpoint's configuration, or made of a recipe and its vocabulary.

A configuration is Hugging Face's config.json, OpenAI's hparams.json, or the config.json of a KerasHub preset.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from builder.plain_files import is_plain, read_json
from builder.recipe import ModelRecipe
from builder.special_tokens import TokenIds
from serving.bundle import Geometry
from serving.errors import InputError

CONFIG, HPARAMS = "config.json", "hparams.json"
_OPENAI_KEYS = {
    "vocab_size": "n_vocab",
    "n_positions": "n_ctx",
    "n_embd": "n_embd",
    "n_layer": "n_layer",
    "n_head": "n_head",
}
_KERAS_HUB_KEYS = {
    "vocab_size": "vocabulary_size",
    "n_positions": "max_sequence_length",
    "n_embd": "hidden_dim",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_inner": "intermediate_dim",
}
Activation = Literal["gelu_new", "gelu", "relu"]
# Names that transformers has for one function.
_ACTIVATIONS: dict[str, Activation] = {
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh"), "gelu_new"),
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    "relu": "relu",
}
_SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")
# Far above any GPT-2, and low enough that nothing is counted up to it.
_MOST = {"n_layer": 10_000, "n_head": 1_000_000}
_MOST_OTHERWISE = 2**31 - 1


def config_path(folder: Path) -> Path:
    """Return the file that says a checkpoint's sizes; config.json where there is none."""
    return folder / (HPARAMS if is_plain(folder / HPARAMS) and not is_plain(folder / CONFIG) else CONFIG)


def read_config(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's configuration under the names of Hugging Face's config.json.

    Raises InputError if there is none or it is of another kind of model.
    """
    path = config_path(folder)
    try:
        config = read_json(path, "a GPT-2 configuration")
    except FileNotFoundError:
        raise InputError(
            f"{folder}: no config.json (or OpenAI's hparams.json) here; name the folder of a whole GPT-2 checkpoint"
        ) from None
    try:
        if path.name == HPARAMS:
            return {ours: config[theirs] for ours, theirs in _OPENAI_KEYS.items()} | {"model_type": "gpt2"}
        if is_keras_hub(config):
            backbone = config["config"]
            return {ours: backbone[theirs] for ours, theirs in _KERAS_HUB_KEYS.items()} | {"model_type": "gpt2"}
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: not a GPT-2 configuration ({type(error).__name__}: {error})") from None
    if config.get("model_type") != "gpt2":
        raise InputError(f"{path}: model_type is {config.get('model_type')!r}; only 'gpt2' can be read")
    return config


def is_keras_hub(config: dict[str, Any]) -> bool:
    """Return whether a config.json is that of a KerasHub preset of GPT-2."""
    return config.get("class_name") == "GPT2Backbone" and isinstance(config.get("config"), dict)


def read_geometry(folder: Path, ids: TokenIds | None = None) -> Geometry:
    """Return the geometry of the checkpoint in `folder`.

    The token ids are `ids`, or without them those of config.json. Raises InputError for anything that is not the GPT-2
    architecture as this project builds it.
    """
    path, config = config_path(folder), read_config(folder)
    name = config.get("activation_function", "gelu_new")
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise InputError(f"{path}: activation_function is {name!r}; can be built: {', '.join(_ACTIVATIONS)}")
    if config.get("auto_map"):
        raise InputError(f"{path}: auto_map names code of its own, which is never run; name a plain GPT-2 checkpoint")
    if config.get("add_cross_attention", False):
        raise InputError(f"{path}: add_cross_attention is {config['add_cross_attention']!r}; only False can be built")
    try:
        width = int(config["n_embd"])
        inner = config.get("n_inner")
        positions = config.get("n_positions")
        geometry = Geometry(
            vocab_size=int(config["vocab_size"]),
            n_positions=int(config["n_ctx"] if positions is None else positions),
            n_embd=width,
            n_layer=int(config["n_layer"]),
            n_head=int(config["n_head"]),
            n_inner=4 * width if inner is None else int(inner),
            layer_norm_epsilon=float(config.get("layer_norm_epsilon", 1e-5)),
            activation_function=_ACTIVATIONS[name],
            bos_token_id=_token_id(config, "bos_token_id") if ids is None else ids.bos,
            eos_token_id=_token_id(config, "eos_token_id") if ids is None else ids.eos,
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise InputError(f"{path}: not a GPT-2 configuration ({type(error).__name__}: {error})") from None
    problem = _problem(geometry)
    if problem:
        raise InputError(f"{path}: {problem}")
    return geometry


def read_sizes(folder: Path) -> Geometry:
    """Return the geometry of the checkpoint in `folder`, whatever its config.json says of tokens; both ids are 0."""
    return read_geometry(folder, TokenIds(0, 0))


def query_scales(folder: Path, geometry: Geometry) -> list[float]:
    """Return what each block's queries are multiplied by so that plain attention, which divides by the root of the head
    size, is what config.json says: 1 unless it sets scale_attn_weights or scale_attn_by_inverse_layer_idx.
    """
    config = read_config(folder)
    plain = 1.0 if config.get("scale_attn_weights", True) else math.sqrt(geometry.head_dim)
    by_layer = bool(config.get("scale_attn_by_inverse_layer_idx", False))
    return [plain / (index + 1 if by_layer else 1) for index in range(geometry.n_layer)]


def _problem(geometry: Geometry) -> str | None:
    """What keeps the sizes of a config.json from being those of a model, or None."""
    for key in _SIZES:
        size, most = getattr(geometry, key), _MOST.get(key, _MOST_OTHERWISE)
        if size < 1:
            return f"{key} is {size}; it must be at least 1"
        if size > most:
            return f"{key} is {size}; it must be at most {most}"
    if not 0 < geometry.layer_norm_epsilon < 1:
        return f"layer_norm_epsilon is {geometry.layer_norm_epsilon:g}; it must lie between 0 and 1"
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


def recipe_geometry(model: ModelRecipe, vocab_size: int, ids: TokenIds) -> Geometry:
    """Return the geometry of a model from scratch with this vocabulary; InputError if the recipe has fewer entries."""
    if 0 < model.vocab_size < vocab_size:
        raise InputError(
            f"recipe key 'model.vocab_size' is {model.vocab_size}, but the tokenizer has {vocab_size} entries; "
            "raise it, or set it to 0"
        )
    return Geometry(
        vocab_size=model.vocab_size or vocab_size,
        n_positions=model.n_positions,
        n_embd=model.n_embd,
        n_layer=model.n_layer,
        n_head=model.n_head,
        n_inner=4 * model.n_embd,
        layer_norm_epsilon=1e-5,
        activation_function="gelu_new",
        bos_token_id=ids.bos,
        eos_token_id=ids.eos,
    )
