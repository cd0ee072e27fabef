"""Fitting: what a step is made of, what the figures mean, and that a run resumes as if it had never stopped."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from builder.data.ngram_baselines import unigram_perplexity
from builder.keras_backend import keras
from builder.model.gpt2 import named_variables
from builder.recipe import TrainingRecipe
from builder.training.optimizers import make_optimizer
from builder.training.plan import limits, plan_steps, weight_names
from builder.training.trainer import LanguageModel, fit
from serving.bundle import Geometry
from serving.errors import TrainingError

GEOMETRY = Geometry(
    vocab_size=32,
    n_positions=16,
    n_embd=16,
    n_layer=2,
    n_head=2,
    n_inner=64,
    layer_norm_epsilon=1e-5,
    activation_function="gelu_new",
    bos_token_id=31,
    eos_token_id=31,
)
RECIPE = TrainingRecipe(epochs=3.0, batch_size=4, sequence_length=16, validations=4, jit_compile=False)
# A language that context decides: each token is the last one plus 1 or 2, by a coin.
TOKENS = (np.cumsum(np.random.default_rng(0).integers(1, 3, 2000)) % 31).astype(np.uint16)
TRAIN, VALIDATION = TOKENS[:1600], TOKENS[1600:]


def train(folder, recipe=RECIPE, notify=lambda event: None, run_id="run"):
    keras.utils.set_random_seed(7)
    model = LanguageModel.create(GEOMETRY)
    history = fit(model, recipe, TRAIN, VALIDATION, seed=1, folder=folder, run_id=run_id, notify=notify)
    return {name: np.array(variable) for name, variable in named_variables(model)}, history


def test_steps_cover_the_epochs_in_equal_intervals():
    assert plan_steps(RECIPE, 100) == (76, 19)  # 75 steps, rounded up to four intervals.
    assert plan_steps(replace(RECIPE, epochs=0.001), 100) == (1, 1)
    assert plan_steps(replace(RECIPE, epochs=0.0), 100) == (0, 1)


def test_weights_are_known_by_name_before_there_is_a_model():
    names = [name.removeprefix("transformer.") for name, _ in named_variables(LanguageModel.create(GEOMETRY))]
    assert list(weight_names(GEOMETRY.n_layer)) == names


def test_figures_of_a_short_run_or_a_short_text_are_said_to_be_so():
    assert limits({"steps": 20, "validation_tokens": 1000}) == limits({"steps": 0, "validation_tokens": 1000}) == []
    assert "training took 3 (" in limits({"steps": 3, "validation_tokens": 1000})[0]
    assert "the validation text has 27 (" in limits({"steps": 20, "validation_tokens": 27})[0]
    figures = {"steps": 1, "validation_tokens": 5000, "counted_validation_tokens": 9}
    assert [sentence.partition(":")[0] for sentence in limits(figures)] == ["too few steps", "too few tokens"]


def test_a_loss_that_is_not_used_is_refused():
    model = LanguageModel.create(GEOMETRY)
    for options in ({"loss": "mse"}, {"metrics": ["accuracy"]}, {"weighted_metrics": ["accuracy"]}):
        with pytest.raises(TypeError, match=f"takes no {next(iter(options))}"):
            model.compile(optimizer="adam", **options)


@pytest.mark.parametrize(
    ("optimizer", "rate"),
    [
        ("adamw", 5e-3),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in (("muon", 1e-2), ("adam", 5e-3), ("sgd", 1.0))),
    ],
)
def test_training_learns_what_context_tells(tmp_path, optimizer, rate):
    _, history = train(tmp_path, replace(RECIPE, optimizer=optimizer, learning_rate=rate, epochs=12.0))
    last = history[-1]
    assert last["validation_perplexity"] == pytest.approx(math.exp(last["validation_loss"]))
    # Two tokens are possible after each: a perplexity of 2 is perfect, and frequencies alone give about 31.
    assert last["validation_perplexity"] < 3 < 20 < unigram_perplexity(TRAIN, VALIDATION, 32)
    assert 0.3 < last["validation_accuracy"] < 0.7
    assert [row["step"] for row in history] == [75, 150, 225, 300]


def test_validation_figures_are_those_of_the_weights(tmp_path):
    weights, history = train(tmp_path)
    model = LanguageModel.create(GEOMETRY)
    for name, variable in named_variables(model):
        variable.assign(weights[name])
    losses = []
    for start in range(0, len(VALIDATION) - 1, 16):
        row = VALIDATION[start : start + 17].astype(np.int32)
        logits = model(row[None, :-1]).numpy()[0].astype(np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses += (-log_probs[np.arange(len(row) - 1), row[1:]]).tolist()
    assert len(losses) == len(VALIDATION) - 1
    assert history[-1]["validation_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


class Stop(Exception):
    """Stands for a process that is killed."""


def test_a_stopped_run_resumes_bit_for_bit(tmp_path):
    whole, history = train(tmp_path / "whole")
    seen = []

    def stop_at(event):
        seen.append(event["step"])
        if event["step"] == 45 and "validation" not in event:
            raise Stop

    with pytest.raises(Stop):
        train(tmp_path / "parts", notify=stop_at)
    seen.clear()
    resumed, resumed_history = train(tmp_path / "parts", notify=lambda event: seen.append(event["step"]))
    assert seen[0] == 39  # The checkpoint is of step 38, the second validation.
    for name, array in whole.items():
        np.testing.assert_array_equal(array, resumed[name], err_msg=name)
    for ours, theirs in zip(history, resumed_history, strict=True):
        assert ours["validation_loss"] == theirs["validation_loss"]


@pytest.mark.slow
def test_another_run_does_not_take_up_the_checkpoint(tmp_path):
    train(tmp_path)
    seen = []
    train(tmp_path, notify=lambda event: seen.append(event["step"]), run_id="another")
    assert seen[0] == 1


def test_no_epochs_measure_the_weights_as_they_are(tmp_path):
    keras.utils.set_random_seed(7)
    before = {name: np.array(variable) for name, variable in named_variables(LanguageModel.create(GEOMETRY))}
    weights, history = train(tmp_path, replace(RECIPE, epochs=0.0))
    assert len(history) == 1
    assert history[0]["step"] == 0
    assert 25 < history[0]["validation_perplexity"] < 40
    for name, array in before.items():
        np.testing.assert_array_equal(array, weights[name])


def test_a_loss_that_is_no_number_stops_with_the_step_and_keeps_the_checkpoint(tmp_path):
    poisoned = replace(RECIPE, optimizer="adamw", learning_rate=1.0, max_grad_norm=1e30)

    def poison(event):
        if event.get("step") == 30 and "validation" not in event:
            raise_nan[0].assign(np.full(raise_nan[0].shape, np.nan, np.float32))

    keras.utils.set_random_seed(7)
    model = LanguageModel.create(GEOMETRY)
    raise_nan = [model.ln_f.gamma]
    with pytest.raises(TrainingError, match="not a number at step 31 of 76"):
        fit(model, poisoned, TRAIN, VALIDATION, seed=1, folder=tmp_path, run_id="run", notify=poison)
    assert (tmp_path / "checkpoint.safetensors").is_file()


def test_no_two_weights_start_alike():
    keras.utils.set_random_seed(7)
    first = {}
    for name, variable in named_variables(LanguageModel.create(GEOMETRY)):
        values = np.array(variable).ravel()[:8]
        if np.ptp(values) > 0:
            for other, seen in first.items():
                assert not np.allclose(values, seen), f"{name} starts as {other} does"
            first[name] = values
    assert len(first) == 2 + 4 * GEOMETRY.n_layer


def test_only_matrices_of_the_blocks_decay():
    model = LanguageModel.create(GEOMETRY)
    recipe = replace(RECIPE, optimizer="adamw", learning_rate=0.1, weight_decay=1.0, warmup_fraction=0.0)
    optimizer = make_optimizer(recipe, 10)
    optimizer.build(model.trainable_variables)
    before = {name: np.array(variable) for name, variable in named_variables(model)}
    optimizer.apply(
        [keras.ops.zeros_like(variable) for variable in model.trainable_variables], model.trainable_variables
    )
    for name, variable in named_variables(model):
        decays = name.endswith("weight") and ".ln_" not in name and ".wte" not in name and ".wpe" not in name
        decays = decays and "ln_f" not in name
        changed = not np.array_equal(before[name], np.array(variable))
        assert changed == decays, name
