"""Readers of the files that GPT-2's weights come in: safetensors, transformers' tf_model.h5, TensorFlow checkpoints.

Each gives its tensors one at a time, so that no more than one is in memory beside the model. Nothing is unpickled, and
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
from typing import Any

from builder.model.weight_names import Layout
from serving.errors import InputError

Reader = Callable[[], Any]
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_STATE = re.compile(r'^model_checkpoint_path:\s*"([^"]+)"', re.MULTILINE)


@dataclass(frozen=True)
class WeightFiles:
    """The weights of a folder: their layout, the files, and `label`, the name to tell a person."""

    layout: Layout
    paths: tuple[Path, ...]
    label: str

    def tensors(self) -> Iterator[tuple[str, Reader]]:
        """Give (name in this layout, function that reads the tensor as float32) for every tensor.

        Raises InputError, as the functions do, for a file that is cut off or of another kind, and for a tensor of
        another type than a float.
        """
        read = {"safetensors": _safetensors, "h5": _h5, "checkpoint": _checkpoint}[self.layout]
        for path in self.paths:
            yield from read(path)


def has_weights(folder: Path) -> bool:
    """Return whether `find_weights` would find safetensors or h5 files, whole or not."""
    names = ("model.safetensors", "model.safetensors.index.json", "tf_model.h5", "tf_model.h5.index.json")
    return any((folder / name).is_file() for name in names)


def find_weights(folder: Path) -> WeightFiles:
    """Return the weights of a folder; of several kinds safetensors come first, then h5, then a TensorFlow checkpoint.

    Raises InputError for a folder with only pickled weights or none, for a broken index and for a missing shard.
    """
    kinds: tuple[tuple[str, Layout], ...] = (("model.safetensors", "safetensors"), ("tf_model.h5", "h5"))
    for name, layout in kinds:
        if (folder / name).is_file():
            return WeightFiles(layout, (folder / name,), name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            paths = _shards(index)
            return WeightFiles(layout, paths, f"{name} in {len(paths)} shards")
    prefix = _checkpoint_prefix(folder)
    if prefix is not None:
        return WeightFiles("checkpoint", (prefix,), f"TensorFlow checkpoint {prefix.name}")
    if any(path.suffix in _PICKLED for path in folder.glob("*")):
        raise InputError(
            f"{folder}: only pickled weights (.bin) here, which are never unpickled; convert them where you trust them "
            "with transformers' from_pretrained(...).save_pretrained(..., safe_serialization=True)"
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
    if state.is_file():
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
            raise InputError(f"{path}: tensor {name!r} is {array.dtype.name}, which is no plain float; widen it first")
        return array.astype(np.float32, copy=False)

    return as_float32


def _safetensors(path: Path) -> Iterator[tuple[str, Reader]]:
    from safetensors import safe_open

    def read(name: str) -> Any:
        # What was read of a mapped file counts as this process's memory until the file is closed.
        with safe_open(path, framework="np") as file:
            return file.get_tensor(name)

    with _readable(path), safe_open(path, framework="np") as file:
        names = list(file.keys())
    for name in names:
        yield name, _reader(path, name, partial(read, name))


def _h5(path: Path) -> Iterator[tuple[str, Reader]]:
    import h5py

    found: list[tuple[str, Any]] = []

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found.append((name, item))

    with _readable(path):
        file = h5py.File(path, "r")
    with file:
        with _readable(path):
            file.visititems(visit)  # Links to other files are not followed.
        for name, dataset in found:
            # The layer's name, the model class's and "transformer" stand in front, by version once or twice.
            short = name.rpartition("transformer/")[2]
            if dataset.external or dataset.is_virtual:
                raise InputError(
                    f"{path}: tensor {short!r} is kept in another file, which is not opened; fetch it again"
                )
            yield short, _reader(path, short, partial(dataset.__getitem__, ()))


def _checkpoint(path: Path) -> Iterator[tuple[str, Reader]]:
    import tensorflow as tf

    with _readable(path):
        reader = tf.train.load_checkpoint(str(path))
        names = sorted(reader.get_variable_to_shape_map())
    for name in names:
        yield name, _reader(path, name, partial(reader.get_tensor, name))
