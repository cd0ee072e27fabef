"""KerasHub's GPT-2 in Keras 3's .weights.h5: its variables under our names, its three projections joined into one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from serving.errors import InputError

Reader = Callable[[], Any]
_BLOCK = re.compile(r"(?:.*/)?layers/transformer_decoder(?:_(\d+))?/(.+)/vars/(\d)")
_OUTSIDE = re.compile(
    r"(?:.*/)?layers/(reversible_embedding|token_embedding|position_embedding|layer_norm\w*)/vars/(\d)"
)
_LAYERS = {
    "_self_attention_layer_norm": "ln_1",
    "_self_attention_layer/output_dense": "attn.c_proj",
    "_feedforward_layer_norm": "ln_2",
    "_feedforward_intermediate_dense": "mlp.c_fc",
    "_feedforward_output_dense": "mlp.c_proj",
}
_PROJECTIONS = tuple(f"_self_attention_layer/{each}_dense" for each in ("query", "key", "value"))
_KINDS = ("weight", "bias")


def keras_hub_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], readers: Mapping[str, Reader]
) -> Iterator[tuple[str, tuple[int, ...], Reader]]:
    """Give (our name, shape, reader) for each weight among the datasets of a .weights.h5.

    Raises InputError if the file is not that of a GPT2Backbone or a GPT2CausalLM.
    """
    projections: dict[tuple[int, str], dict[str, str]] = {}
    found = False
    for stored, shape in shapes.items():
        block, outside = _BLOCK.fullmatch(stored), _OUTSIDE.fullmatch(stored)
        if block and block[2] in _LAYERS:
            name = f"h.{int(block[1] or 0)}.{_LAYERS[block[2]]}.{_KINDS[int(block[3])]}"
            # A head's axis stands apart: [heads, head size, width] is the matrix [heads * head size, width].
            yield (name, *_flat(readers[stored], shape, keep_last=True))
        elif block and block[2] in _PROJECTIONS:
            projections.setdefault((int(block[1] or 0), _KINDS[int(block[3])]), {})[block[2]] = stored
        elif outside:
            yield (_outside_name(outside[1], int(outside[2])), shape, readers[stored])
        else:
            yield (stored, shape, readers[stored])
            continue
        found = True
    if not found:
        raise InputError(
            f"{path}: not the weights of KerasHub's GPT2Backbone or GPT2CausalLM; it has {next(iter(shapes), None)!r}"
        )
    for (index, kind), parts in projections.items():
        if set(parts) == set(_PROJECTIONS):
            stored_parts = [parts[each] for each in _PROJECTIONS]
            yield (f"h.{index}.attn.c_attn.{kind}", *_joined(stored_parts, shapes, readers))


def _outside_name(layer: str, place: int) -> str:
    if layer == "position_embedding":
        return "wpe.weight"
    if layer.startswith("layer_norm"):
        return f"ln_f.{_KINDS[place]}"
    # The second variable of a reversible embedding is a head that is not tied; Keras keeps it transposed.
    return "wte.weight" if place == 0 else "lm_head.weight"


def _flat(read: Reader, shape: tuple[int, ...], keep_last: bool) -> tuple[tuple[int, ...], Reader]:
    """A tensor of three axes as a matrix: [a, b, c] to [a * b, c], or to [a, b * c]."""
    if len(shape) != 3:
        return shape, read
    matrix = (shape[0] * shape[1], shape[2]) if keep_last else (shape[0], shape[1] * shape[2])
    return matrix, lambda: read().reshape(matrix)


def _joined(
    stored: list[str], shapes: Mapping[str, tuple[int, ...]], readers: Mapping[str, Reader]
) -> tuple[tuple[int, ...], Reader]:
    """Query, key and value side by side, each with its heads' axes joined: [width, 3 * width], a bias [3 * width]."""
    is_bias = len(shapes[stored[0]]) == 2

    def part(name: str) -> Any:
        shape = shapes[name]
        return readers[name]().reshape((prod(shape),) if is_bias else (shape[0], prod(shape[1:])))

    def read() -> Any:
        import numpy as np

        return np.concatenate([part(name) for name in stored], axis=-1)

    widths = [prod(shapes[name]) if is_bias else prod(shapes[name][1:]) for name in stored]
    return ((sum(widths),) if is_bias else (shapes[stored[0]][0], sum(widths))), read
