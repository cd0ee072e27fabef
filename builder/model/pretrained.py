"""Where a model starts: a GPT-2 checkpoint in a local folder or on the hub, or random weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.model.checkpoint_formats import find_weights
from builder.model.gpt2 import GPT2
from builder.model.weight_names import fits, stored_names
from builder.recipe import ModelRecipe
from builder.run_folder import STAMP
from serving.bundle import Geometry
from serving.errors import InputError

_CONFIG, _HPARAMS = "config.json", "hparams.json"
_OPENAI_KEYS = {
    "vocab_size": "n_vocab",
    "n_positions": "n_ctx",
    "n_embd": "n_embd",
    "n_layer": "n_layer",
    "n_head": "n_head",
}


@dataclass(frozen=True)
class Base:
    """Where a base checkpoint's parts lie: its weights with their configuration, and its tokenizer."""

    weights: Path
    tokenizer: Path

    def files(self) -> list[Path]:
        """The files that decide what is read, sorted."""
        return sorted({path for folder in (self.weights, self.tokenizer) for path in folder.glob("*")})


def local_base(name: str) -> Base | None:
    """Return the parts of the base checkpoint in the local folder `name`, or None if there is no such folder.

    The folder is a Hugging Face model's (a bundle is one), OpenAI's, or that of a run. Raises InputError for a run that
    is not trained, or was prepared anew since.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return None
    prepared, trained = folder / "prepare" / STAMP, folder / "train" / STAMP
    configured = any((folder / each).is_file() for each in (_CONFIG, _HPARAMS))
    if configured or not (prepared.parent.is_dir() or trained.parent.is_dir()):
        return Base(folder, folder)
    if not prepared.is_file() or not trained.is_file():
        raise InputError(f"{folder}: this run is not trained yet; run 'gpt2-bundle train' with its recipe first")
    if prepared.stat().st_mtime_ns > trained.stat().st_mtime_ns:
        raise InputError(
            f"{folder}: this run was prepared anew since it was trained; run 'gpt2-bundle train' with its recipe first"
        )
    return Base(trained.parent, prepared.parent / "tokenizer")


def resolve_base(name: str) -> Base:
    """Return where a base checkpoint lies: in the local folder `name` if there is one, else in the hub's cache.

    Raises InputError if there is neither.
    """
    local = local_base(name)
    if local is not None:
        return local
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists():
        raise InputError(f"model.base {name!r}: no such folder; name the folder of a whole GPT-2 checkpoint")
    from builder.model.hub import download

    folder = download(name)
    return Base(folder, folder)


def read_geometry(folder: Path) -> Geometry:
    """Return the geometry of the checkpoint in `folder` from its config.json, else from OpenAI's hparams.json.

    Raises InputError for anything that is not the GPT-2 architecture as this project builds it.
    """
    path = _config_path(folder)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if path.name == _HPARAMS:
            config = {ours: config[theirs] for ours, theirs in _OPENAI_KEYS.items()} | {"model_type": "gpt2"}
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
        raise InputError(
            f"{folder}: no config.json (or OpenAI's hparams.json) here; name the folder of a whole GPT-2 checkpoint"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise InputError(f"{path}: not a GPT-2 configuration ({type(error).__name__}: {error})") from None
    for key, ours in _FIXED.items():
        if config.get(key, ours) != ours:
            raise InputError(f"{path}: {key} is {config[key]!r}; only {ours!r} can be built")
    problem = _problem(geometry)
    if problem:
        raise InputError(f"{path}: {problem}")
    return geometry


def _config_path(folder: Path) -> Path:
    """The file that says a checkpoint's sizes; config.json where there is none."""
    return folder / (_HPARAMS if (folder / _HPARAMS).is_file() and not (folder / _CONFIG).is_file() else _CONFIG)


def _problem(geometry: Geometry) -> str | None:
    """What keeps the sizes of a config.json from being those of a model, or None."""
    for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
        if getattr(geometry, key) < 1:
            return f"{key} is {getattr(geometry, key)}; it must be at least 1"
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


# Switches of Hugging Face's GPT2Config that change the mathematics; the released models have them all as here.
_FIXED = {
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}


def geometry_of(model: ModelRecipe, vocab_size: int, end_token: int, base: Base | None = None) -> Geometry:
    """Return the geometry that a recipe trains: the base checkpoint's, or the recipe's own with this vocabulary.

    `base` spares resolving `model.base` a second time. Raises InputError for one that cannot be exported afterwards.
    """
    if model.base:
        geometry = read_geometry((base or resolve_base(model.base)).weights)
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


def load_weights(model: Any, folder: Path) -> str:
    """Assign the weights in `folder` (see `checkpoint_formats`) to a Keras GPT-2; return what was read, in words.

    Half precision is widened. Raises InputError for a tensor that is missing, there twice, of another shape or not
    finite, by name, and for files that cannot be read.
    """
    import numpy as np

    from builder.model.gpt2 import named_variables

    files = find_weights(folder)
    variables = named_variables(model)
    wanted = {stored: (name, variable) for name, variable in variables for stored in stored_names(files.layout, name)}
    missing = {name: stored_names(files.layout, name)[0] for name, _ in variables}
    for stored, read in files.tensors():
        if stored not in wanted:
            continue
        name, variable = wanted[stored]
        if name not in missing:
            raise InputError(f"{folder}: tensor {stored!r} is there twice; name a folder with one model")
        array, shape = read(), tuple(variable.shape)
        if not fits(files.layout, array.shape, shape):
            raise InputError(
                f"{folder}: tensor {stored!r} has shape {list(array.shape)}, but {_config_path(folder).name} makes it "
                f"{list(shape)}"
            )
        if not np.isfinite(array).all():
            raise InputError(f"{folder}: tensor {stored!r} holds infinities or not-a-numbers; fetch it again")
        variable.assign(array.reshape(shape))
        del missing[name]
    if missing:
        raise InputError(
            f"{folder}: tensor {min(missing.values())!r} is missing ({len(missing)} in all); fetch it again"
        )
    return files.label


def load_model(folder: Path) -> GPT2:
    """Return the Keras model of a folder with config.json and model.safetensors."""
    model = GPT2.create(read_geometry(folder))
    load_weights(model, folder)
    return model
