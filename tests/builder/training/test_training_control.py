"""Training control: schedules, accumulation, averages, early stopping, best weights, and the second loop."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builder.keras_backend import keras, tf
from builder.model.gpt2 import named_variables
from builder.recipe import TrainingRecipe
from builder.training.checkpoints import BEST, FILE, Progress
from builder.training.optimizers import make_optimizer, make_schedule
from builder.training.trainer import LanguageModel, evaluate, exported_row, fit
from serving.errors import TrainingError
from tests.builder.training.test_trainer import GEOMETRY, RECIPE, TRAIN, VALIDATION, Stop

# Seven steps an interval. Between two ways of the same run only the order of float32 sums may differ.
ADAM = replace(RECIPE, optimizer="adamw", learning_rate=5e-3, epochs=1.1)
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


def run(
    folder: Path,
    recipe: TrainingRecipe = ADAM,
    validation: Any = VALIDATION,
    notify: Any = lambda event: None,
    workers: Any = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    keras.utils.set_random_seed(7)
    model = LanguageModel.create(GEOMETRY)
    history = fit(model, recipe, TRAIN, validation, seed=1, folder=folder, run_id="run", notify=notify, workers=workers)
    row = exported_row(history, recipe)
    measured = evaluate(model, validation, recipe)
    assert measured["validation_loss"] == pytest.approx(row["validation_loss"], rel=1e-4), "exports other weights"
    return {name: np.array(variable) for name, variable in named_variables(model)}, history


def close(first: dict[str, Any], second: dict[str, Any]) -> None:
    for name, array in first.items():
        ours, theirs = array, second[name]
        if name.endswith("c_attn.bias"):
            # A key's bias moves all of a query's scores alike, so its gradient is rounding, which Adam makes steps of.
            ours, theirs = (np.delete(bias, np.s_[16:32]) for bias in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, err_msg=name, **CLOSE)


def expected_rate(kind: str, step: int) -> float:
    """The recipe below, by hand: 100 steps, 20 of warm-up, a peak of 0.5, a tenth of it at the end."""
    if step < 20:
        return 0.5 * step / 20
    share = (step - 20) / 80
    return {
        "constant": 0.5,
        "linear": 0.5 * (1 - 0.9 * share),
        "cosine": 0.5 * (0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2),
        "inverse_sqrt": 0.5 * math.sqrt(20 / step),
    }[kind]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "inverse_sqrt"])
@pytest.mark.parametrize("parts", [1, 4])
def test_a_schedule_is_its_formula(kind: str, parts: int) -> None:
    recipe = replace(
        RECIPE, schedule=kind, learning_rate=0.5, warmup_fraction=0.2, final_learning_rate_fraction=0.1,
        accumulation=parts,
    )  # fmt: skip
    optimizer = make_optimizer(recipe, 100)
    for step in (0, 1, 10, 19, 20, 21, 60, 99, 100):
        optimizer._iterations.assign(step * parts + parts - 1)
        assert float(optimizer.learning_rate) == pytest.approx(expected_rate(kind, step), rel=1e-5), step


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "inverse_sqrt"])
def test_without_warm_up_a_schedule_begins_at_the_peak(kind: str) -> None:
    schedule = make_schedule(replace(RECIPE, schedule=kind, warmup_fraction=0.0), 10)
    assert float(schedule(0)) == pytest.approx(RECIPE.learning_rate)


def test_smoothed_labels_are_a_mixture_in_training_only() -> None:
    model = LanguageModel.create(GEOMETRY)
    model.label_smoothing = 0.25
    random = np.random.default_rng(3)
    logits = random.normal(size=(2, 5, 32)).astype(np.float32)
    ids = random.integers(32, size=(2, 5)).astype(np.int32)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = 0.75 * np.eye(32)[ids] + 0.25 / 32
    plain = -np.take_along_axis(log_probs, ids[..., None], -1).mean()
    assert float(model.compute_loss(None, ids, logits)) == pytest.approx(-(target * log_probs).sum(-1).mean(), rel=1e-5)
    assert float(model.compute_loss(None, ids, logits, training=False)) == pytest.approx(plain, rel=1e-5)
    assert float(model.perplexity.result()) == pytest.approx(math.exp(plain), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_accumulated_parts_are_the_big_batch(tmp_path: Path, optimizer: str) -> None:
    recipe = replace(ADAM, optimizer=optimizer)
    whole, history = run(tmp_path / "whole", recipe)
    parts, of_parts = run(tmp_path / "parts", replace(recipe, accumulation=2))
    assert [row["step"] for row in of_parts] == [row["step"] for row in history] == [7, 14, 21, 28]
    close(whole, parts)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"accumulation": 2}, marks=pytest.mark.slow),
        pytest.param({"ema": 0.9, "label_smoothing": 0.1}, marks=pytest.mark.slow),
        pytest.param({"jit_compile": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_custom_loop_gives_the_weights_of_fit(tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe = replace(ADAM, **changes)
    ours, history = run(tmp_path / "custom", replace(recipe, loop="custom"))
    theirs, of_fit = run(tmp_path / "fit", recipe)
    assert history[-1]["step"] == 28
    close(ours, theirs)
    for row, other in zip(history, of_fit, strict=True):
        assert {key: value for key, value in row.items() if key != "tokens_per_second"} == pytest.approx(
            {key: value for key, value in other.items() if key != "tokens_per_second"}, rel=1e-3
        )


class Alone:
    """The only worker of a cluster, whose sums over all workers are its own."""

    rank, size, is_chief, failure = 0, 1, True, ""
    sums = 0

    def all_reduce(self, values: Any) -> Any:
        self.sums += 1
        return np.array(values)

    from_chief = all_reduce


@pytest.mark.parametrize("loop", ["fit", "custom"])
def test_sums_over_one_worker_change_nothing(tmp_path: Path, loop: str) -> None:
    recipe, alone = replace(ADAM, loop=loop, epochs=0.3, validations=2), Alone()
    one, history = run(tmp_path / "one", recipe)
    ours, of_ours = run(tmp_path / "ours", recipe, workers=alone)
    assert alone.sums > 2 * history[-1]["step"] >= 16
    close(ours, one)
    for row, other in zip(of_ours, history, strict=True):
        for key in ("train_loss", "validation_loss", "validation_accuracy", "learning_rate"):
            assert row[key] == pytest.approx(other[key], rel=1e-5), key


def test_the_average_is_what_is_exported(tmp_path: Path) -> None:
    recipe = replace(ADAM, ema=0.8, epochs=0.1, validations=3)
    steps: list[list[Any]] = []
    keras.utils.set_random_seed(7)
    model = LanguageModel.create(GEOMETRY)

    def note(event: dict[str, Any]) -> None:
        if "validation" not in event:
            steps.append([variable.numpy() for variable in model.trainable_variables])

    fit(model, recipe, TRAIN, VALIDATION, seed=1, folder=tmp_path, run_id="run", notify=note)
    average = steps[0]
    for weights in steps[1:]:
        average = [0.8 * old + 0.2 * new for old, new in zip(average, weights, strict=True)]
    assert len(steps) == 3
    for variable, expected in zip(model.trainable_variables, average, strict=True):
        np.testing.assert_allclose(variable.numpy(), expected, err_msg=variable.path, **CLOSE)


# What carries state from one step to another, or from one validation to the next.
STATEFUL = {"ema": 0.9, "accumulation": 2, "keep": "best", "patience": 2, "checkpoints_kept": 2, "label_smoothing": 0.1}


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["fit", "custom"])
def test_a_stopped_run_resumes_bit_for_bit_with_all_that_carries_state(tmp_path: Path, loop: str) -> None:
    recipe = replace(ADAM, loop=loop, **STATEFUL)  # type: ignore[arg-type]
    whole, history = run(tmp_path / "whole", recipe)

    def stop(event: dict[str, Any]) -> None:
        if event["step"] == 17 and "validation" not in event:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "parts", recipe, notify=stop)
    seen: list[int] = []
    resumed, resumed_history = run(tmp_path / "parts", recipe, notify=lambda event: seen.append(event["step"]))
    assert seen[0] == 15
    for name, array in whole.items():
        np.testing.assert_array_equal(array, resumed[name], err_msg=name)
    assert [row["validation_loss"] for row in history] == [row["validation_loss"] for row in resumed_history]
    # And a run that was finished gives the same once more, without a step.
    again, _ = run(tmp_path / "parts", recipe, notify=lambda event: pytest.fail("trained again"))
    for name, array in whole.items():
        np.testing.assert_array_equal(array, again[name], err_msg=name)


@pytest.mark.slow
def test_dropout_resumes_bit_for_bit(tmp_path: Path) -> None:
    def train(folder: Path, stop_at: int = 0) -> list[Any]:
        keras.utils.set_random_seed(7)
        model = LanguageModel.create(GEOMETRY, embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1)

        def notify(event: dict[str, Any]) -> None:
            if event["step"] == stop_at and "validation" not in event:
                raise Stop

        fit(model, ADAM, TRAIN, VALIDATION, seed=1, folder=folder, run_id="run", notify=notify)
        return [np.array(variable) for _, variable in named_variables(model)]

    whole = train(tmp_path / "whole")
    with pytest.raises(Stop):
        train(tmp_path / "parts", stop_at=9)
    for ours, theirs in zip(train(tmp_path / "parts"), whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)


# Of another language than the training text, so that learning the one makes the other worse.
OTHER = ((np.cumsum(np.random.default_rng(5).integers(7, 9, 200)) * 3) % 31).astype(np.uint16)


@pytest.mark.parametrize("loop", ["fit", pytest.param("custom", marks=pytest.mark.slow)])
def test_training_stops_when_validations_bring_nothing_and_keeps_the_best(tmp_path: Path, loop: str) -> None:
    recipe = replace(ADAM, loop=loop, learning_rate=2e-2, epochs=3.0, validations=12, patience=2, keep="best")
    _, history = run(tmp_path, recipe, OTHER)
    losses = [row["validation_loss"] for row in history]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 12
    assert exported_row(history, recipe) is history[best]
    _, again = run(tmp_path, recipe, OTHER, notify=lambda event: pytest.fail("went on"))
    assert again == history
    # Without the best weights the run cannot end as it would have, so it is made anew.
    (tmp_path / BEST).unlink()
    _, anew = run(tmp_path, recipe, OTHER)
    assert [row["validation_loss"] for row in anew] == losses


def test_stale_counts_validations_since_the_first_of_the_lowest() -> None:
    def stale(*losses: float) -> int:
        return Progress(0, [{"validation_loss": loss} for loss in losses]).stale

    assert stale() == stale(3.0) == stale(3.0, 2.0) == 0
    assert stale(2.0, 2.0) == stale(2.0, 3.0) == 1
    assert stale(3.0, 1.0, 2.0, 1.5, 1.0) == 3


@pytest.mark.slow
def test_the_newest_checkpoints_stay_and_an_older_one_serves_when_the_newest_is_broken(tmp_path: Path) -> None:
    recipe = replace(ADAM, checkpoints_kept=3)
    whole, _ = run(tmp_path, recipe)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-000000014.safetensors", "checkpoint-000000021.safetensors", FILE]
    (tmp_path / FILE).write_bytes(b"broken")
    seen: list[int] = []
    weights, _ = run(tmp_path, recipe, notify=lambda event: seen.append(event["step"]))
    assert seen[0] == 22
    for name, array in whole.items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)


@pytest.mark.parametrize("loop", ["fit", "custom"])
def test_a_loss_that_is_no_number_names_the_rows(tmp_path: Path, loop: str) -> None:
    recipe = replace(ADAM, loop=loop, accumulation=2)
    keras.utils.set_random_seed(7)
    model = LanguageModel.create(GEOMETRY)

    def poison(event: dict[str, Any]) -> None:
        if event["step"] == 3:
            model.ln_f.gamma.assign(tf.fill(model.ln_f.gamma.shape, math.nan))

    with pytest.raises(TrainingError, match="at step 4 of 28, on the rows that begin at tokens") as caught:
        fit(model, recipe, TRAIN, VALIDATION, seed=1, folder=tmp_path, run_id="run", notify=poison)
    places = json.loads("[" + str(caught.value).partition("tokens ")[2].partition(" of the")[0] + "]")
    from builder.data.packed_batches import RowSampler

    assert places == RowSampler(TRAIN, 16, 4, 1).starts(3).tolist()
    assert all(0 <= place < len(TRAIN) for place in places)
