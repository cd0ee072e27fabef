"""One table of GPT-2's tensors under the names of every layout that a base checkpoint comes in.

The left column is Hugging Face's name, which is ours. transformers' TensorFlow classes and OpenAI's release keep some
tensors with an axis of length 1 in front (h5: the biases of the four projections; OpenAI: their matrices); nothing is
transposed anywhere.
"""

from __future__ import annotations

import re
from typing import Literal

Layout = Literal["safetensors", "h5", "checkpoint"]

# Hugging Face: (tf_model.h5, with what other versions of transformers called it; OpenAI's checkpoint).
_EMBEDDINGS = {
    "wte.weight": (("wte/weight:0", "wte/embeddings:0"), "wte"),
    "wpe.weight": (("wpe/embeddings:0", "wpe/weight:0"), "wpe"),
}
_LAYERS = {
    **dict.fromkeys(("ln_1", "ln_2", "ln_f"), ("gamma:0", "beta:0", "g", "b")),
    **dict.fromkeys(("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), ("weight:0", "bias:0", "w", "b")),
}
_OBJECT = re.compile(r"(?:.*/)?transformer/(.+)/\.ATTRIBUTES/VARIABLE_VALUE")
_OBJECT_BLOCK = re.compile(r"h/(\d+)/")
_IN_A_BLOCK = re.compile(r"h\.(\d+)\.(.+)")


def stored_names(layout: Layout, name: str) -> tuple[str, ...]:
    """Return what a layout may call the tensor `name`, which is as in Hugging Face's GPT2LMHeadModel.

    An h5 name is relative to the "transformer" layer, whose path holds the model class's name. Raises KeyError for a
    name that is not GPT-2's.
    """
    short = name.removeprefix("transformer.")
    if layout == "safetensors":
        # OpenAI's upload to the hub has no prefix.
        return short, f"transformer.{short}"
    block = _IN_A_BLOCK.fullmatch(short)
    number, rest = block.groups() if block else (None, short)
    if rest in _EMBEDDINGS:
        in_h5, in_checkpoint = _EMBEDDINGS[rest]
        return in_h5 if layout == "h5" else (f"model/{in_checkpoint}",)
    layer, _, kind = rest.rpartition(".")
    h5_weight, h5_bias, weight, bias = _LAYERS[layer]
    path = layer.replace(".", "/")
    ours, theirs = {"weight": (h5_weight, weight), "bias": (h5_bias, bias)}[kind]
    if layout == "h5":
        return (f"h_._{number}/{path}/{ours}" if block else f"{path}/{ours}",)
    return (f"model/h{number}/{path}/{theirs}" if block else f"model/{path}/{theirs}",)


def h5_name_of_object(name: str) -> str | None:
    """Return the h5 name of a variable that `save_weights` of a TensorFlow class wrote to an object checkpoint.

    None for what is not a variable of the model: the object graph, a counter, an optimizer's slot.
    """
    found = _OBJECT.fullmatch(name)
    if not found or "/.OPTIMIZER_SLOT/" in name:
        return None
    block = _OBJECT_BLOCK.match(found[1])
    return (f"h_._{block[1]}/{found[1][block.end() :]}" if block else found[1]) + ":0"


def fits(layout: Layout, stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Return whether a tensor stored with this shape is one of the `wanted` shape, an axis of 1 in front aside."""
    return stored == wanted or (layout != "safetensors" and stored == (1, *wanted))
