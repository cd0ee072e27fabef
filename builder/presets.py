"""Named geometries: OpenAI's four releases of GPT-2 and DistilGPT-2, and small ones for two cores."""

from __future__ import annotations

from dataclasses import replace

from builder.recipe import ModelRecipe
from serving.errors import InputError
from serving.suggest import did_you_mean

# name: (n_layer, n_embd, n_head, n_positions). The GPT-2 rows are those of the released hparams.json files.
PRESETS: dict[str, tuple[int, int, int, int]] = {
    "nano": (2, 128, 2, 128),
    "mini": (4, 256, 4, 256),
    "small": (6, 384, 6, 512),
    "distilgpt2": (6, 768, 12, 1024),
    "gpt2": (12, 768, 12, 1024),
    "gpt2-medium": (24, 1024, 16, 1024),
    "gpt2-large": (36, 1280, 20, 1024),
    "gpt2-xl": (48, 1600, 25, 1024),
}


def resolve_preset(model: ModelRecipe) -> ModelRecipe:
    """Return `model` with its preset's geometry filled in; raise `InputError` for an unknown preset."""
    if not model.preset:
        return model
    if model.preset not in PRESETS:
        raise InputError(f"recipe key model.preset: no preset {model.preset!r}{did_you_mean(model.preset, PRESETS)}")
    n_layer, n_embd, n_head, n_positions = PRESETS[model.preset]
    return replace(model, preset="", n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_positions=n_positions)
