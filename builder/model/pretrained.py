"""Where a model starts: a GPT-2 checkpoint in a local folder or on the hub, or random weights."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.model.geometry import CONFIG, HPARAMS, query_scales, read_geometry, recipe_geometry
from builder.model.lora_adapter import ADAPTER_CONFIG, LoraAdapter, adapter_base
from builder.model.weight_matching import match_weights
from builder.plain_files import is_plain
from builder.recipe import ModelRecipe
from builder.run_folder import STAMP
from builder.special_tokens import TokenIds
from serving.bundle import Geometry
from serving.errors import InputError

if TYPE_CHECKING:
    from builder.model.gpt2 import GPT2

_READ = (
    *("*.json", "*.jinja", "*.txt", "*.bpe", "*.safetensors", "*.h5"),
    *("checkpoint", "*.index", "*.data-*"),  # A TensorFlow checkpoint.
)
_TOKENIZER_NAMES = ("tokenizer.json", "vocab.json", "vocab.txt", "encoder.json")


@dataclass(frozen=True)
class Base:
    """Where a base checkpoint's parts lie: its weights with their configuration, its tokenizer, an adapter if any."""

    weights: Path
    tokenizer: Path
    adapter: Path | None = None

    def files(self) -> list[Path]:
        """The files that decide what is read, sorted. A README or pickled weights next to them decide nothing."""
        folders = [self.weights, self.tokenizer, *([self.adapter] if self.adapter else [])]
        paths = sorted({path for folder in folders for path in folder.glob("*")})
        return [path for path in paths if any(fnmatchcase(path.name, pattern) for pattern in _READ) and path.is_file()]


def local_base(name: str) -> Base | None:
    """Return the parts of the base checkpoint in the local folder `name`, or None if there is no such folder.

    The folder is a Hugging Face model's (a bundle is one), OpenAI's, a KerasHub preset, a PEFT adapter, or that of a
    run. Raises InputError for a run that is not trained, or was prepared again since.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return None
    if is_plain(folder / ADAPTER_CONFIG):
        return _with_adapter(folder)
    prepared, trained = folder / "prepare" / STAMP, folder / "train" / STAMP
    configured = any(is_plain(folder / each) for each in (CONFIG, HPARAMS))
    if configured or not (prepared.parent.is_dir() or trained.parent.is_dir()):
        assets = folder / "assets" / "tokenizer"
        return Base(folder, assets if assets.is_dir() else folder)
    if not prepared.is_file() or not trained.is_file():
        raise InputError(f"{folder}: this run is not trained yet; run 'gpt2-bundle train' with its recipe first")
    if prepared.stat().st_mtime_ns > trained.stat().st_mtime_ns:
        raise InputError(
            f"{folder}: this run was prepared again since it was trained; run 'gpt2-bundle train' with its recipe first"
        )
    return Base(trained.parent, prepared.parent / "tokenizer")


def _with_adapter(folder: Path) -> Base:
    """The base that a PEFT adapter names, with the adapter; the tokenizer is the adapter's own if it has one."""
    name = adapter_base(folder)
    base = local_base(name) if Path(name).expanduser().resolve() != folder.resolve() else None
    base = base or resolve_base(name)
    if base.adapter is not None:
        raise InputError(f"{folder}: the adapter's base {name!r} is an adapter too; merge that one first")
    own = any(is_plain(folder / each) for each in _TOKENIZER_NAMES)
    return Base(base.weights, folder if own else base.tokenizer, folder)


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
    return local_base(str(folder)) or Base(folder, folder)


def geometry_of(model: ModelRecipe, vocab_size: int, ids: TokenIds, base: Base | None = None) -> Geometry:
    """Return the geometry that a recipe trains: the base checkpoint's, or the recipe's own with this vocabulary.

    `ids` are those of the prepared tokenizer, whatever the base's config.json says. `base` spares resolving
    `model.base` a second time. Raises InputError for one that is not GPT-2.
    """
    if model.base:
        return read_geometry((base or resolve_base(model.base)).weights, ids)
    return recipe_geometry(model, vocab_size, ids)


def load_weights(model: Any, folder: Path, adapter: Path | None = None) -> str:
    """Assign the weights in `folder` (see `checkpoint_formats`) to a Keras GPT-2; return what was read, in words.

    Half precision is widened, other scales of attention are multiplied into the queries, and the LoRA `adapter` is
    merged. Raises InputError for a tensor that is missing, there twice, of another shape or not finite, by name, and
    for files that cannot be read.
    """
    import numpy as np

    from builder.model.gpt2 import named_variables

    matched = match_weights(folder, model.geometry)
    lora = LoraAdapter(adapter, model.geometry) if adapter is not None else None
    scales = query_scales(folder, model.geometry)
    for name, variable in named_variables(model):
        short = name.removeprefix("transformer.")
        tensor, shape = matched.tensors[short]
        array = tensor.read().reshape(shape)
        if not np.isfinite(array).all():
            raise InputError(f"{folder}: tensor {tensor.name!r} holds infinities or not-a-numbers; mend or replace it")
        if lora is not None:
            array = lora.merged(short, array)
        if ".attn.c_attn." in short and (scale := scales[int(short.split(".")[1])]) != 1:
            array[..., : model.geometry.n_embd] *= np.float32(scale)
        variable.assign(array)
    folded = "; attention's scale multiplied into the queries" if any(scale != 1 for scale in scales) else ""
    return matched.description + (f" with the adapter {lora.description}" if lora is not None else "") + folded


def load_model(folder: Path) -> GPT2:
    """Return the Keras model of a folder with config.json and model.safetensors."""
    # TensorFlow, which a finished build that only looks for its base never loads.
    from builder.model.gpt2 import GPT2

    model = GPT2.create(read_geometry(folder))
    load_weights(model, folder)
    return model
