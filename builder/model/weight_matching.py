"""The tensors of a checkpoint against the sizes that its configuration says, from names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.model.checkpoint_formats import Stored, WeightFiles, find_weights
from builder.model.geometry import config_path, read_config
from builder.model.weight_names import fits, stored_names
from serving.bundle import Geometry
from serving.errors import InputError

HEAD, EMBEDDING = "lm_head.weight", "wte.weight"
# What a checkpoint holds besides a model: causal masks that old versions saved, and the state of a training.
_NO_WEIGHTS = re.compile(
    r"(?:transformer\.)?h\.\d+\.attn\.(?:bias|masked_bias)|optimizer/.*|"
    r"(?:.*/)?(?:Adam(?:_\d+)?|Momentum|beta[12]_power|step|global_step|save_counter)"
)
_BLOCK_NUMBER = re.compile(r"(?:^|/|\.)h(?:_\._|\.)?(\d+)[./]")
_MOST_NAMES = 4


@dataclass(frozen=True)
class Matched:
    """The weights of a folder by Hugging Face's names without "transformer.", each of its shape.

    `others` are the names of tensors that GPT-2 does not have.
    """

    label: str
    tensors: dict[str, tuple[Stored, tuple[int, ...]]]
    others: tuple[str, ...]

    @property
    def description(self) -> str:
        """The name of the files, and what of them is left out."""
        return self.label + (f" (left out, not GPT-2's: {_listed(self.others)})" if self.others else "")


def weight_shapes(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight by its Hugging Face name without "transformer."."""
    width, inner = geometry.n_embd, geometry.n_inner
    norm = {"weight": (width,), "bias": (width,)}
    matrices = {
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, inner),
        "mlp.c_proj": (inner, width),
    }
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (geometry.vocab_size, width),
        "wpe.weight": (geometry.n_positions, width),
    }
    for index in range(geometry.n_layer):
        for layer in ("ln_1", "ln_2"):
            shapes |= {f"h.{index}.{layer}.{kind}": shape for kind, shape in norm.items()}
        for layer, shape in matrices.items():
            shapes |= {f"h.{index}.{layer}.weight": shape, f"h.{index}.{layer}.bias": (shape[1],)}
    return shapes | {f"ln_f.{kind}": shape for kind, shape in norm.items()}


def match_weights(folder: Path, geometry: Geometry) -> Matched:
    """Find every weight of `geometry` in a folder; nothing but names and shapes is read.

    Raises InputError, by name, for a tensor that is missing, there twice or of another shape, for another number of
    blocks, and for files that cannot be read.
    """
    files = find_weights(folder)
    layout, stored = files.tensors()
    said = config_path(folder).name
    _check_blocks(folder, said, geometry, stored)
    shapes = weight_shapes(geometry)
    names = {each: name for name in shapes for each in stored_names(layout, name)}
    head = {HEAD} if layout == "safetensors" else set()
    found: dict[str, tuple[Stored, tuple[int, ...]]] = {}
    others = []
    for tensor in stored:
        name = HEAD if tensor.name in head else names.get(tensor.name)
        if name is None:
            others += [] if _NO_WEIGHTS.fullmatch(tensor.name) else [tensor.name]
            continue
        shape = shapes[EMBEDDING if name == HEAD else name]
        if name in found:
            raise InputError(f"{folder}: tensor {tensor.name!r} is there twice; name a folder with one model")
        if not fits(layout, tensor.shape, shape):
            raise InputError(
                f"{folder}: tensor {tensor.name!r} has shape {list(tensor.shape)}, but {said} makes it {list(shape)}"
            )
        found[name] = tensor, shape
    # safetensors' save_model drops one of two tied tensors, whichever it meets second.
    if EMBEDDING not in found and HEAD in found and is_tied(folder):
        found[EMBEDDING] = found[HEAD]
    missing = [stored_names(layout, name)[0] for name in shapes if name not in found]
    if missing:
        raise InputError(_missing(folder, files, min(missing), len(missing), others))
    return Matched(files.label, found, tuple(sorted(others)))


def is_tied(folder: Path) -> bool:
    """Return whether config.json says, or leaves it to the default, that the head is the token embedding."""
    return bool(read_config(folder).get("tie_word_embeddings", True))


def check_head(folder: Path, matched: Matched) -> None:
    """Raise InputError for a head that is not the token embedding: there is only one matrix for both in every graph."""
    embedding, _ = matched.tensors[EMBEDDING]
    head = matched.tensors.get(HEAD)
    where = config_path(folder).name
    if head is None:
        if not is_tied(folder):
            raise InputError(
                f"{folder}: tie_word_embeddings in {where} is false, but there is no {HEAD}; name a whole checkpoint"
            )
        return
    difference = 0.0 if head[0] is embedding else _largest_difference(head[0].read(), embedding.read())
    if difference > 0:
        raise InputError(
            f"{folder}: {HEAD} differs from {EMBEDDING} (by up to {difference:.3g}); only a head that is tied to the "
            "token embedding can be built"
        )


def _largest_difference(head: Any, embedding: Any) -> float:
    import numpy as np

    largest = 0.0
    for start in range(0, len(head), 4096):
        part = np.abs(head[start : start + 4096] - embedding[start : start + 4096])
        largest = max(largest, float(np.max(np.nan_to_num(part, nan=np.inf), initial=0.0)))
    return largest


def _check_blocks(folder: Path, said: str, geometry: Geometry, stored: Iterable[Stored]) -> None:
    numbers = {int(found[1]) for tensor in stored if (found := _BLOCK_NUMBER.search(tensor.name))}
    if numbers and max(numbers) + 1 != geometry.n_layer:
        raise InputError(
            f"{folder}: {said} says n_layer {geometry.n_layer}, but the weights have {max(numbers) + 1} blocks; "
            "name a folder whose files belong together"
        )


def _missing(folder: Path, files: WeightFiles, name: str, count: int, others: list[str]) -> str:
    there = f"; other tensors there: {_listed(sorted(others))}" if others else ""
    advice = "name the folder of a whole GPT-2 checkpoint"
    return f"{folder}: tensor {name!r} is missing ({count} in all) in {files.label}{there}; {advice}"


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - _MOST_NAMES} more" if len(every) > _MOST_NAMES else ""
    return ", ".join(every[:_MOST_NAMES]) + more
