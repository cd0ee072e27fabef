"""Readers of the files that GPT-2's weights come in: safetensors, transformers' tf_model.h5, TensorFlow checkpoints of
OpenAI or of a Keras model, and the .weights.h5 of KerasHub.

Each gives its tensors one at a time, so that memory holds the model and at most one tensor. Nothing is unpickled, and
no file but those of the folder is opened.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from builder.model.keras_hub_weights import keras_hub_tensors
from builder.model.weight_names import Layout, h5_name_of_object
from builder.plain_files import is_plain
from serving.errors import InputError

Reader = Callable[[], Any]
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_WRAPPERS = re.compile(r"^(?:(?:_orig_mod|module)\.)+")
_OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
_STATE = re.compile(r'^model_checkpoint_path:\s*"([^"]+)"', re.MULTILINE)


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: its name in the file's layout, its shape, and a function that reads it as float32."""

    name: str
    shape: tuple[int, ...]
    read: Reader


@dataclass(frozen=True)
class WeightFiles:
    """The weights of a folder: the kind of file, the files, and `label`, the name to tell a person."""

    kind: Literal["safetensors", "h5", "keras", "checkpoint"]
    paths: tuple[Path, ...]
    label: str

    def tensors(self) -> tuple[Layout, list[Stored]]:
        """Return the layout of the names, and every tensor.

        Raises InputError, as reading a tensor does, for a file that is cut off or of another kind, and for a tensor of
        another type than a float.
        """
        read = {"safetensors": safetensors_tensors, "h5": _h5, "keras": _keras, "checkpoint": _checkpoint}[self.kind]
        stored = [tensor for path in self.paths for tensor in read(path)]
        layout: Layout = "safetensors" if self.kind == "keras" else self.kind
        if any(name.endswith(":0") for name in (tensor.name for tensor in stored)):
            layout = "h5"  # What transformers' TensorFlow classes saved, in whichever kind of file.
        return layout, stored


def has_weights(folder: Path) -> bool:
    """Return whether `find_weights` would find safetensors or h5 files, whole or not."""
    names = ("model.safetensors", "model.safetensors.index.json", "tf_model.h5", "tf_model.h5.index.json")
    return any(is_plain(folder / name) for name in (*names, "model.weights.h5"))


def find_weights(folder: Path) -> WeightFiles:
    """Return the weights of a folder; of several kinds safetensors come first, then h5, then KerasHub's, then a
    TensorFlow checkpoint.

    Raises InputError for a folder with only pickled weights or none, for a broken index and for a missing shard.
    """
    kinds: tuple[tuple[str, Literal["safetensors", "h5"]], ...] = (
        ("model.safetensors", "safetensors"),
        ("tf_model.h5", "h5"),
    )
    for name, kind in kinds:
        if is_plain(folder / name):
            return WeightFiles(kind, (folder / name,), name)
        index = folder / f"{name}.index.json"
        if is_plain(index):
            paths = _shards(index)
            return WeightFiles(kind, paths, f"{name} in {len(paths)} shards")
    keras = sorted(folder.glob("*.weights.h5"))
    if len(keras) > 1:
        raise InputError(f"{folder}: {len(keras)} files of weights (.weights.h5); leave the one that is meant")
    if keras and is_plain(keras[0]):
        return WeightFiles("keras", (keras[0],), keras[0].name)
    prefix = _checkpoint_prefix(folder)
    if prefix is not None:
        return WeightFiles("checkpoint", (prefix,), f"TensorFlow checkpoint {prefix.name}")
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLED)
    if any(name.endswith(".bin") for name in pickled):
        raise InputError(
            f"{folder}: only pickled weights ({pickled[0]}) here, which are never unpickled; convert them where you "
            "trust them with transformers' from_pretrained(...).save_pretrained(..., safe_serialization=True)"
        )
    if pickled:
        raise InputError(
            f"{folder}: only pickled weights ({pickled[0]}) here, which are never unpickled; where you trust them, "
            "convert them with the script in docs/checkpoints.md (it explains the layout of nanoGPT)"
        )
    raise InputError(
        f"{folder}: no model.safetensors, tf_model.h5 or TensorFlow checkpoint here; name the folder of a whole GPT-2 "
        "checkpoint"
    )


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted({Path(place).as_posix() for place in places})
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{index}: not an index of shards; fetch it again") from None
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise InputError(f"{index.parent}: {name!r} is named by the index but is not there; fetch it again")
    return tuple(index.parent / name for name in names)


def _checkpoint_prefix(folder: Path) -> Path | None:
    """The path of a TensorFlow checkpoint without its .index, or None if there is none."""
    state = folder / "checkpoint"
    if is_plain(state):
        with _readable(state):
            found = _STATE.search(state.read_text(encoding="utf-8"))
        if not found:
            raise InputError(f"{state}: names no model_checkpoint_path, as TensorFlow's does; fetch it again")
        # The folder may have been moved since: what counts is the name.
        prefix = folder / Path(found[1]).name
        if not prefix.with_name(prefix.name + ".index").is_file():
            raise InputError(f"{folder}: {prefix.name + '.index'!r}, which 'checkpoint' names, is not there; fetch it")
        return prefix
    indexes = sorted(folder.glob("*.index"))
    if len(indexes) > 1:
        raise InputError(f"{folder}: {len(indexes)} TensorFlow checkpoints and no file 'checkpoint' to say which")
    return indexes[0].with_suffix("") if indexes else None


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what a library raises on a broken file into one line. The libraries' errors share no base."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: cannot be read ({reason}); fetch it again") from None


def _reader(path: Path, name: str, read: Reader) -> Reader:
    def as_float32() -> Any:
        import numpy as np

        with _readable(path):
            array = np.asarray(read())
        if array.dtype.name not in _FLOATS:
            kind = array.dtype.name
            raise InputError(f"{path}: tensor {name!r} is {kind}, which is not a plain float type; widen it first")
        return array.astype(np.float32, copy=False)

    return as_float32


def safetensors_tensors(path: Path) -> Iterator[Stored]:
    """Give every tensor of a safetensors file. Raises InputError for a broken one."""
    from safetensors import safe_open

    def read(name: str) -> Any:
        # What was read of a mapped file counts as this process's memory until the file is closed.
        with safe_open(path, framework="np") as file:
            return file.get_tensor(name)

    with _readable(path), safe_open(path, framework="np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for name, shape in shapes.items():
        # Wrappers of training (torch.compile, DataParallel) put names of their own in front.
        short = _WRAPPERS.sub("", name)
        if short.endswith(":0"):
            short = short.rpartition("transformer/")[2]
        yield Stored(short, shape, _reader(path, name, partial(read, name)))


def _datasets(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    """The names and shapes of the datasets of an HDF5 file, which may not lie in another file."""
    import h5py

    found: list[tuple[str, tuple[int, ...]]] = []

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            if item.external or item.is_virtual:
                short = name.rpartition("transformer/")[2]
                raise InputError(f"{path}: tensor {short!r} is kept in another file, which is not opened")
            found.append((name, tuple(item.shape)))

    with _readable(path), h5py.File(path, "r") as file:
        file.visititems(visit)  # Links to other files are not followed.
    return found


def _dataset(path: Path, name: str) -> Any:
    import h5py

    with h5py.File(path, "r") as file:
        return file[name][()]


def _h5(path: Path) -> Iterator[Stored]:
    for name, shape in _datasets(path):
        # The layer's name, the model class's and "transformer" stand in front, by version once or twice.
        short = name.rpartition("transformer/")[2]
        yield Stored(short, shape, _reader(path, short, partial(_dataset, path, name)))


def _keras(path: Path) -> Iterator[Stored]:
    shapes = dict(_datasets(path))
    readers = {name: _reader(path, name, partial(_dataset, path, name)) for name in shapes}
    for name, shape, read in keras_hub_tensors(path, shapes, readers):
        yield Stored(name, shape, read)


def _checkpoint(path: Path) -> Iterator[Stored]:
    import tensorflow as tf

    with _readable(path):
        reader = tf.train.load_checkpoint(str(path))
        shapes = reader.get_variable_to_shape_map()
    for name in sorted(shapes):
        # A Keras model's save_weights names its objects, which a TensorFlow 1 Saver did not.
        short = h5_name_of_object(name) if _OBJECT_GRAPH in shapes else name
        if short is not None:
            yield Stored(short, tuple(shapes[name]), _reader(path, name, partial(reader.get_tensor, name)))
