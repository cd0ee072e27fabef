"""Which weights are trained: all, all but the frozen ones, or low-rank adapters alone."""

from __future__ import annotations

from fnmatch import fnmatchcase

from builder.model.gpt2 import GPT2, named_variables
from builder.recipe import TrainingRecipe
from builder.training.plan import unknown_weight
from serving.errors import InputError


def set_trainable(model: GPT2, recipe: TrainingRecipe) -> None:
    """Freeze what the recipe's `freeze` names and, with `lora_rank`, everything but new adapters.

    LoRA (Hu et al. 2021): a target's matrix W reads as W + A B * alpha / rank, A random and B zero at first; Keras's
    `Dense.enable_lora`. What reads `kernel` afterwards, as an export does, gets the merged matrix.

    Raises InputError for a pattern that names no weight, and if nothing is left to train.
    """
    named = [(name.removeprefix("transformer."), variable) for name, variable in named_variables(model)]
    for pattern in recipe.freeze:
        found = [variable for name, variable in named if fnmatchcase(name, pattern.removeprefix("transformer."))]
        if not found:
            raise unknown_weight(pattern)
        for variable in found:
            variable.trainable = False
    if recipe.lora_rank:
        for _, variable in named:
            variable.trainable = False
        for block in model.blocks:
            for target in recipe.lora_targets:
                block.matrices[target].enable_lora(recipe.lora_rank, lora_alpha=recipe.lora_alpha or None)
    if not model.trainable_variables:
        raise InputError("recipe key 'training.freeze' freezes every weight; set training.epochs=0 to train none")
