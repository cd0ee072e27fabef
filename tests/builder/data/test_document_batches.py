"""Masked and padded rows: the order, the weights, and a loss that is exact over what is counted."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builder.data.document_batches import (
    DocumentRows,
    counted_targets,
    describe_loss,
    make_sampler,
    training_batches,
    validation_batches,
)
from builder.data.masked_shards import COUNTED, LAST, Shard
from builder.data.ngram_baselines import trigram_perplexity, unigram_perplexity
from builder.keras_backend import keras
from builder.model.gpt2 import named_variables
from builder.recipe import TrainingRecipe
from builder.training.checkpoints import FILE
from builder.training.freezing import set_trainable
from builder.training.metrics_log import MetricsLog, read_metrics
from builder.training.trainer import LanguageModel, evaluate, fit
from serving.errors import InputError
from tests.builder.training.test_trainer import GEOMETRY, RECIPE, Stop

END = 31
CLOSE = {"rtol": 3e-4, "atol": 3e-5}
ADAM = replace(RECIPE, optimizer="adamw", learning_rate=5e-3, epochs=1.0, validations=2)


def shard(documents: int, seed: int) -> Shard:
    """Documents of 2 to 24 tokens, the second half of each counted; some have nothing counted."""
    random = np.random.default_rng(seed)
    ids, mask = [], []
    for index in range(documents):
        length = int(random.integers(2, 24))
        tokens = (random.integers(31) + np.cumsum(random.integers(1, 3, length))) % 31
        counted = (np.arange(length) >= length // 2) & (index % 7 > 0)
        ids += [*tokens.tolist(), END]
        mask += [*counted.astype(int).tolist(), (COUNTED if index % 7 else 0) | LAST]
    return Shard(np.array(ids, np.uint16), np.array(mask, np.uint8), END)


TRAIN, VALIDATION = shard(120, 1), shard(30, 2)


def train(folder: Path, recipe: TrainingRecipe, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    keras.utils.set_random_seed(7)
    model = LanguageModel.create(GEOMETRY)
    set_trainable(model, recipe)
    options = {"notify": lambda event: None} | options
    train_on, validation = options.pop("train_on", TRAIN), options.pop("validation", VALIDATION)
    history = fit(model, recipe, train_on, validation, seed=1, folder=folder, run_id="run", **options)
    return {name: np.array(variable) for name, variable in named_variables(model)}, history


def close(first: dict[str, Any], second: dict[str, Any]) -> None:
    for name, array in first.items():
        ours, theirs = array, second[name]
        if name.endswith("c_attn.bias"):  # Adam makes steps of a key's bias's rounding.
            ours, theirs = (np.delete(bias, np.s_[16:32]) for bias in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, err_msg=name, **CLOSE)


def documents(of: Shard) -> list[tuple[list[int], list[int]]]:
    assert of.mask is not None
    ends = np.flatnonzero(of.mask & LAST) + 1
    return [
        (of.ids[start:end].tolist(), (of.mask[start:end] & COUNTED).tolist())
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]


def test_a_row_is_a_document() -> None:
    rows = DocumentRows(TRAIN, 16)
    expected = [(ids, counted) for ids, counted in documents(TRAIN) if any(counted[1:17])]
    assert len(rows) == len(expected) < rows.documents == 120
    assert rows.truncated == sum(len(ids) > 17 for ids, _ in expected) > 0
    inputs, targets, weights = rows.batch(np.arange(len(rows)))
    for row, (ids, counted) in enumerate(expected):
        ids, counted = ids[:17], counted[:17]
        assert inputs[row].tolist() == (ids + [0] * 16)[:16]
        assert targets[row, : len(ids) - 1].tolist() == ids[1:]
        assert weights[row].tolist() == [*counted[1:], *[0] * (17 - len(ids))]
    plain = DocumentRows(Shard(np.array([END, 4, END, 5, 6, END], np.uint16), None, END), 16)
    assert plain.starts.tolist() == [1, 3]  # An end token alone has no target.


@pytest.mark.parametrize("packing", ["stream", "rows"])
def test_batches_are_a_function_of_the_step_and_weights_make_a_mean(packing: str) -> None:
    recipe = replace(ADAM, packing=packing, accumulation=2)
    whole = list(training_batches(TRAIN, recipe, seed=3, steps=60).as_numpy_iterator())
    resumed = list(training_batches(TRAIN, recipe, seed=3, steps=60, start_step=41).as_numpy_iterator())
    for ours, theirs in zip(whole[82:], resumed, strict=True):
        for left, right in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(left, right)
    for step in range(60):
        first, second = (whole[2 * step + part][2] for part in (0, 1))
        assert (first.sum() + second.sum()) / 2 == pytest.approx(1, rel=1e-5)
        assert len(np.unique(np.concatenate([first[first > 0], second[second > 0]]))) == 1
    sampler = make_sampler(TRAIN, recipe, 3)
    if packing == "rows":  # Each document once an epoch.
        seen = np.concatenate([sampler.starts(step) for step in range(sampler.rows)])
        assert all((np.unique(epoch, return_counts=True)[1] == 1).all() for epoch in seen.reshape(4, -1))


def reference_loss(weights: dict[str, Any], recipe: TrainingRecipe) -> tuple[float, int]:
    """Mean loss over the counted targets of the validation shard, row by row."""
    model = LanguageModel.create(GEOMETRY)
    for name, variable in named_variables(model):
        variable.assign(weights[name])
    if recipe.packing == "rows":
        rows = [(ids[:17], counted[:17]) for ids, counted in documents(VALIDATION)]
    else:
        assert VALIDATION.mask is not None
        rows = [
            (VALIDATION.ids[start : start + 17].tolist(), (VALIDATION.mask[start : start + 17] & COUNTED).tolist())
            for start in range(0, len(VALIDATION.ids) - 1, 16)
        ]
    losses = []
    for ids, counted in rows:
        logits = model(np.array([ids[:-1]], np.int32)).numpy()[0].astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses += [-logs[place, token] for place, token in enumerate(ids[1:]) if counted[place + 1]]
    return float(np.mean(losses)), len(losses)


@pytest.mark.parametrize("packing", [pytest.param("stream", marks=pytest.mark.slow), "rows"])
def test_both_loops_and_any_parts_give_the_same_weights(tmp_path: Path, packing: str) -> None:
    recipe = replace(ADAM, packing=packing, label_smoothing=0.1)
    weights, history = train(tmp_path / "a", recipe)
    changes = {"stream": {"loop": "custom", "accumulation": 2}, "rows": {"accumulation": 4}}[packing]
    close(weights, train(tmp_path / "b", replace(recipe, **changes))[0])
    expected, count = reference_loss(weights, recipe)
    assert history[-1]["validation_loss"] == pytest.approx(expected, rel=1e-5)
    assert counted_targets(VALIDATION, recipe).sum() == count
    total = sum(float((batch[2] > 0).sum()) for batch in validation_batches(VALIDATION, recipe).as_numpy_iterator())
    assert total == count


def test_only_counted_targets_are_learnt(tmp_path: Path) -> None:
    """Other targets may be anything: where no row reads them, the weights are equal to the bit."""
    ids, mask = np.array(TRAIN.ids), np.array(TRAIN.mask)
    # The last token of a document cut there, as an uncounted end token is, is a target and never an input.
    last = np.flatnonzero((mask & LAST) > 0)
    mask[last] &= ~np.uint8(COUNTED)
    other = ids.copy()
    other[last] = 5
    recipe = replace(ADAM, packing="rows", epochs=0.3, validations=1)
    weights, _ = train(tmp_path / "a", recipe, train_on=Shard(ids, mask, END))
    again, _ = train(tmp_path / "b", recipe, train_on=Shard(other, mask, END))
    for name, array in weights.items():
        np.testing.assert_array_equal(array, again[name], err_msg=name)


def test_batches_without_a_counted_target_make_no_nan(tmp_path: Path) -> None:
    assert TRAIN.mask is not None
    mask = np.array(TRAIN.mask)
    mask[: len(mask) // 2] &= LAST
    recipe = replace(ADAM, batch_size=1, epochs=0.5, optimizer="muon", learning_rate=1e-3)
    sparse = Shard(TRAIN.ids, mask, END)
    empty = [float(batch[2].sum()) for batch in training_batches(sparse, recipe, seed=1, steps=20).as_numpy_iterator()]
    assert min(empty) == 0 < max(empty)
    log = MetricsLog(tmp_path, every=1)
    weights, history = train(tmp_path, recipe, train_on=sparse, log=log)
    assert all(np.isfinite(array).all() for array in weights.values())
    assert math.isfinite(history[-1]["train_loss"]) and all(
        math.isfinite(r.get("loss", 0)) for r in read_metrics(tmp_path)
    )


def test_a_stopped_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    recipe = replace(ADAM, packing="rows", lora_rank=2, lora_targets=("attn.c_attn",))
    whole, history = train(tmp_path / "whole", recipe)
    stop = history[0]["step"] + 3

    def stop_at(event: dict[str, Any]) -> None:
        if event["step"] == stop and "validation" not in event:
            raise Stop

    with pytest.raises(Stop):
        train(tmp_path / "parts", recipe, notify=stop_at)
    assert (tmp_path / "parts" / FILE).is_file()
    resumed, _ = train(tmp_path / "parts", recipe)
    for name, array in whole.items():
        np.testing.assert_array_equal(array, resumed[name], err_msg=name)


def test_no_epochs_and_evaluation_count_the_same(tmp_path: Path) -> None:
    recipe = replace(ADAM, epochs=0.0, packing="rows")
    weights, history = train(tmp_path, recipe)
    assert history[0]["validation_loss"] == pytest.approx(reference_loss(weights, recipe)[0], rel=1e-5)
    with pytest.raises(InputError, match="no token of the validation text is counted"):
        describe_loss([TRAIN, Shard(VALIDATION.ids, np.asarray(VALIDATION.mask) & LAST, END)], recipe)
    with pytest.raises(InputError, match="no training document has a counted token"):
        make_sampler(Shard(TRAIN.ids, np.asarray(TRAIN.mask) & LAST, END), recipe, 1)
    model = LanguageModel.create(GEOMETRY)
    every = Shard(VALIDATION.ids, np.asarray(VALIDATION.mask) | COUNTED, END)
    all_counted, plain = (evaluate(model, of, RECIPE) for of in (every, VALIDATION.ids))
    assert all_counted["validation_loss"] == pytest.approx(plain["validation_loss"], rel=1e-6)


def test_n_grams_are_held_to_the_same_targets() -> None:
    recipe = replace(ADAM, packing="rows")
    counted = counted_targets(TRAIN, recipe), counted_targets(VALIDATION, recipe)
    ids, held_out = TRAIN.ids.astype(int), VALIDATION.ids.astype(int)
    counts = np.bincount(ids[counted[0]], minlength=32) + 1
    logs = np.log(counts / counts.sum())[held_out[counted[1]]]
    assert unigram_perplexity(ids, held_out, 32, counted) == pytest.approx(math.exp(-logs.mean()))
    # All counted is as none given, and a token that is not counted may be another one at a document's end.
    every = np.ones(len(ids), bool), np.ones(len(held_out), bool)
    assert trigram_perplexity(ids, held_out, 32, every) == trigram_perplexity(ids, held_out, 32)
    assert trigram_perplexity(ids, held_out, 32, counted) != trigram_perplexity(ids, held_out, 32)
    one = counted[1].copy()
    one[:] = False
    one[40] = True
    chosen = trigram_perplexity(ids, held_out, 32, (counted[0], one))
    assert chosen == pytest.approx(
        trigram_perplexity(ids, held_out[38:41], 32, (counted[0], np.array([0, 0, 1], bool)))
    )
