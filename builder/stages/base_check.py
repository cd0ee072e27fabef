"""What a base checkpoint is, read and checked before any text is: its sizes, its tokenizer, its weights' names."""

from __future__ import annotations

from dataclasses import dataclass, replace

from builder.data.base_tokenizer import BaseTokenizer, read_base_tokenizer
from builder.model.geometry import read_sizes
from builder.model.lora_adapter import LoraAdapter
from builder.model.pretrained import Base, resolve_base
from builder.model.weight_matching import check_head, match_weights
from builder.recipe import ModelRecipe
from serving.bundle import Geometry


@dataclass(frozen=True)
class CheckedBase:
    """A base checkpoint whose parts fit together."""

    parts: Base
    geometry: Geometry
    tokenizer: BaseTokenizer


def read_base(model: ModelRecipe) -> CheckedBase:
    """Return the base of a recipe. Raises InputError for one that is not there, not whole or not a GPT-2."""
    parts = resolve_base(model.base)
    geometry = read_sizes(parts.weights)
    check_head(parts.weights, match_weights(parts.weights, geometry))
    if parts.adapter is not None:
        LoraAdapter(parts.adapter, geometry)
    tokenizer = read_base_tokenizer(parts.tokenizer, parts.weights, geometry.vocab_size, model.end_token)
    ids = tokenizer.ids
    return CheckedBase(parts, replace(geometry, bos_token_id=ids.bos, eos_token_id=ids.eos), tokenizer)
