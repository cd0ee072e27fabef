"""What a run of training will be, and what its figures can say; known without TensorFlow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from builder.model.geometry import read_sizes
from builder.model.pretrained import resolve_base
from builder.recipe import Recipe, TrainingRecipe, fit_context
from serving.errors import InputError

FEW_STEPS = 20
"""Fewer updates of the weights than this are a trial, whatever the text."""
FEW_TOKENS = 1000
"""On fewer tokens than this, the standard error of a loss is a tenth of a nat or more, and perplexities say little."""

OWN_PROGRAM = "own program"
"""What `training.loop` is in the manifest of a model that was not trained by a recipe."""
_LAYERS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def settled(recipe: Recipe) -> Recipe:
    """Return `recipe` with what its base checkpoint decides, such as the longest row.

    Raises InputError for settings that the model contradicts, and for a base whose configuration cannot be read.
    """
    n_layer = recipe.model.n_layer
    if recipe.model.base:
        geometry = read_sizes(resolve_base(recipe.model.base).weights)
        n_layer = geometry.n_layer
        recipe = fit_context(recipe, geometry.n_positions, f"the context of model.base {recipe.model.base!r},")
    names = list(weight_names(n_layer))
    for pattern in recipe.training.freeze:
        if not any(fnmatchcase(name, pattern.removeprefix("transformer.")) for name in names):
            raise unknown_weight(pattern)
    return recipe


def weight_names(n_layer: int) -> Iterator[str]:
    """Yield the names of a GPT-2's weights in a Hugging Face checkpoint, without the prefix "transformer."."""
    yield from ("wte.weight", "wpe.weight")
    for layer in (*(f"h.{block}.{layer}" for block in range(n_layer) for layer in _LAYERS), "ln_f"):
        yield from (f"{layer}.weight", f"{layer}.bias")


def unknown_weight(pattern: str) -> InputError:
    """The refusal of a `training.freeze` pattern that no weight has."""
    return InputError(
        f"recipe key 'training.freeze': {pattern!r} names no weight; they are called as in a Hugging Face "
        "checkpoint, for example 'wte.weight', 'h.0.*' or '*.bias'"
    )


def plan_steps(recipe: TrainingRecipe, rows: int) -> tuple[int, int]:
    """Return (steps in all, steps between validations); the first is rounded up to a multiple of the second.

    `rows` are those of an epoch. No epochs are no steps.
    """
    if recipe.epochs == 0:
        return 0, 1
    steps = max(1, math.ceil(recipe.epochs * rows / recipe.batch_size))
    interval = math.ceil(steps / recipe.validations)
    return interval * math.ceil(steps / interval), interval


def warmup_steps(recipe: TrainingRecipe, steps: int) -> int:
    """Return the steps over which the learning rate rises, fewer than `steps`."""
    return min(steps - 1, round(steps * recipe.warmup_fraction))


def settings_line(recipe: TrainingRecipe, steps: int) -> str:
    """Return in one line how `steps` updates of the weights are made."""
    warmup = warmup_steps(recipe, steps)
    decay = f", weight decay {recipe.weight_decay:g}" if recipe.optimizer in ("muon", "adamw") else ""
    return (
        f"training: {steps:,} steps of {recipe.batch_size} x {recipe.sequence_length} tokens with {recipe.optimizer}, "
        f"learning rate {recipe.learning_rate:g} ({recipe.schedule}, {warmup:,} steps of warm-up){decay}"
    )


def fine_tuning_line(recipe: Recipe) -> str:
    """Return in one line how the base checkpoint of a recipe will be trained."""
    training = recipe.training
    if not training.epochs:
        return f"base: {recipe.model.base}, exported as it is"
    return (
        f"base: {recipe.model.base}, fine-tuned for {training.epochs:g} epochs of {training.batch_size} x "
        f"{training.sequence_length} tokens with {training.optimizer}, learning rate {training.learning_rate:g} after "
        f"{training.warmup_fraction:.0%} of warm-up (keys of [training])"
    )


def adapter_line(recipe: TrainingRecipe, trainable: int, parameters: int) -> str:
    """Return in one line which weights are trained, of `parameters` in all."""
    which = f"LoRA of rank {recipe.lora_rank} on {', '.join(recipe.lora_targets)}" if recipe.lora_rank else "trainable"
    return f"{which}: {trainable:,} parameters are trained ({trainable / parameters:.2%} of {parameters:,})"


def limits(figures: Mapping[str, float]) -> list[str]:
    """Return what keeps a training's figures from saying much, as sentences without a full stop.

    `figures` are those of training.json, or a manifest's `quality`.
    """
    found = []
    steps = int(figures.get("steps", 0))
    if 0 < steps < FEW_STEPS:
        found.append(f"too few steps: training took {steps} (fewer than {FEW_STEPS}), so the weights hardly moved")
    tokens = figures.get("counted_validation_tokens", figures.get("validation_tokens", FEW_TOKENS))
    if tokens < FEW_TOKENS:
        found.append(
            f"too few tokens: the validation text has {tokens:.0f} (fewer than {FEW_TOKENS:,}), so its perplexity is "
            "a rough guess"
        )
    return found
