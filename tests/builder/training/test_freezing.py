"""What is trained and in which arithmetic: frozen weights, adapters, bfloat16."""

from __future__ import annotations

import fnmatch
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from builder.keras_backend import keras
from builder.model.gpt2 import GPT2, named_variables, stored_variables
from builder.model.safetensors_file import write_safetensors
from builder.recipe import TrainingRecipe
from builder.recipe_reader import read_recipe
from builder.training.freezing import set_trainable
from builder.training.trainer import LanguageModel, fit, layer_precision
from serving.errors import InputError
from tests.builder.training.test_trainer import GEOMETRY, RECIPE, TRAIN, VALIDATION, Stop

SHORT = replace(RECIPE, optimizer="adamw", learning_rate=5e-3, epochs=0.4, validations=2)


def make(recipe: TrainingRecipe) -> tuple[LanguageModel, dict[str, Any]]:
    """A model as the recipe trains it, and its weights before."""
    keras.utils.set_random_seed(7)
    with layer_precision(recipe.precision):
        model = LanguageModel.create(GEOMETRY)
    before = {name: np.array(variable) for name, variable in named_variables(model)}
    set_trainable(model, recipe)
    return model, before


def train(model: LanguageModel, recipe: TrainingRecipe, folder: Path, stop_at: int = 0) -> list[dict[str, Any]]:
    def notify(event: dict[str, Any]) -> None:
        if event["step"] == stop_at and "validation" not in event:
            raise Stop

    return fit(model, recipe, TRAIN, VALIDATION, seed=1, folder=folder, run_id="run", notify=notify)


def changed(model: Any, before: dict[str, Any]) -> set[str]:
    after = {name: np.array(variable) for name, variable in named_variables(model)}
    return {name.removeprefix("transformer.") for name in before if not np.array_equal(before[name], after[name])}


@pytest.mark.parametrize("patterns", [("wte.*",), ("h.0.*", "transformer.wpe.weight"), ("*.bias",)])
def test_frozen_weights_stay_and_the_others_move(tmp_path: Path, patterns: tuple[str, ...]) -> None:
    recipe = replace(SHORT, freeze=patterns, weight_decay=1.0)
    model, before = make(recipe)
    train(model, recipe, tmp_path)
    names = {name.removeprefix("transformer.") for name in before}
    frozen = {
        name for name in names for pattern in patterns
        if fnmatch.fnmatch(name, pattern.removeprefix("transformer."))
    }  # fmt: skip
    assert frozen and changed(model, before) == names - frozen


def test_patterns_that_freeze_nothing_or_everything_are_refused() -> None:
    with pytest.raises(InputError, match=r"'h\.9\.\*' names no weight"):
        make(replace(SHORT, freeze=("h.9.*",)))
    with pytest.raises(InputError, match="freezes every weight"):
        make(replace(SHORT, freeze=("*",)))


LORA = replace(SHORT, lora_rank=2, lora_alpha=8.0, lora_targets=("attn.c_attn", "mlp.c_proj"), keep="best", ema=0.5)


@pytest.mark.parametrize("loop", ["fit", "custom"])
def test_adapters_alone_are_trained_and_merged_at_export(tmp_path: Path, loop: str) -> None:
    recipe = replace(LORA, loop=loop)
    model, before = make(recipe)
    assert len(model.trainable_variables) == 2 * 2 * GEOMETRY.n_layer
    assert changed(model, before) == set(), "the adapters change the model before they are trained"
    train(model, recipe, tmp_path)
    targets = {f"h.{block}.{name}.weight" for block in range(2) for name in ("attn.c_attn", "mlp.c_proj")}
    assert changed(model, before) == targets
    # The exported matrix is W + A B * alpha / rank, and a model without adapters gives the same logits with it.
    write_safetensors(model, tmp_path / "w.safetensors")
    arrays = load_file(tmp_path / "w.safetensors")
    layer = model.blocks[1].c_attn
    name = "transformer.h.1.attn.c_attn.weight"
    merged = before[name] + layer.lora_kernel_a.numpy() @ layer.lora_kernel_b.numpy() * 4.0
    np.testing.assert_allclose(arrays[name], merged, atol=1e-6)
    plain = GPT2.create(GEOMETRY)
    for key, variable in named_variables(plain):
        variable.assign(arrays[key])
    ids = VALIDATION[:16].astype(np.int32)[None]
    np.testing.assert_allclose(plain(ids).numpy(), model(ids).numpy(), atol=1e-5)


@pytest.mark.slow
def test_adapters_resume_bit_for_bit(tmp_path: Path) -> None:
    whole, _ = make(LORA)
    train(whole, LORA, tmp_path / "whole")
    parts, _ = make(LORA)
    with pytest.raises(Stop):
        train(parts, LORA, tmp_path / "parts", stop_at=8)
    resumed, _ = make(LORA)
    train(resumed, LORA, tmp_path / "parts")
    for (name, ours), (_, theirs) in zip(stored_variables(resumed), stored_variables(whole), strict=True):
        np.testing.assert_array_equal(np.array(ours), np.array(theirs), err_msg=name)


@pytest.mark.slow
def test_bfloat16_computes_so_and_keeps_float32_weights(tmp_path: Path) -> None:
    recipe = replace(SHORT, precision="bfloat16", epochs=3.0)
    model, _ = make(recipe)
    assert {str(variable.dtype) for variable in model.trainable_variables} == {"float32"}
    assert model.blocks[0].c_attn.compute_dtype == "bfloat16"
    assert model(VALIDATION[:16].astype(np.int32)[None]).dtype == "float32"
    ours = train(model, recipe, tmp_path / "ours")
    exact = replace(recipe, precision="float32")
    theirs = train(make(exact)[0], exact, tmp_path / "theirs")
    assert ours[-1]["validation_loss"] != theirs[-1]["validation_loss"]
    assert ours[-1]["validation_loss"] == pytest.approx(theirs[-1]["validation_loss"], abs=0.1)
    assert keras.config.dtype_policy().name == "float32"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.lora_rank=4", "training.freeze=wte.*"], "has no use with training.lora_rank"),
        (["training.lora_rank=4", "training.lora_targets=[]"], "at least one matrix"),
        (["training.lora_targets=c_attn"], "'attn.c_attn'"),
        (["training.precision=bf16"], "did you mean 'bfloat16'"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_recipe(None, overrides)
