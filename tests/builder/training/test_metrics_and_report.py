"""What can be seen of a training: figures as lines and events, samples, and the page."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builder.keras_backend import keras, tf
from builder.recipe import TrainingRecipe
from builder.training.metrics_log import METRICS, TENSORBOARD, MetricsLog, read_metrics
from builder.training.samples import Continuations
from builder.training.trainer import LanguageModel, fit
from builder.training.training_report import write_report
from serving.support.svg_charts import ticks
from tests.builder.training.test_trainer import GEOMETRY, RECIPE, TRAIN, VALIDATION, Stop

SHORT = replace(RECIPE, epochs=0.4, validations=2)  # Ten steps, validated after five and ten.


def train(folder: Path, log: MetricsLog, recipe: TrainingRecipe = SHORT, stop_at: int = 0) -> list[float]:
    """Losses of the steps, as reported: running means since the last validation."""
    keras.utils.set_random_seed(7)
    losses = []

    def notify(event: dict[str, Any]) -> None:
        if "validation" not in event:
            losses.append(event["loss"])
            if event["step"] == stop_at:
                raise Stop

    model = LanguageModel.create(GEOMETRY)
    fit(model, recipe, TRAIN, VALIDATION, seed=1, folder=folder / "c", run_id="r", notify=notify, log=log)
    return losses


@pytest.mark.parametrize(
    "changes", [{}, pytest.param({"loop": "custom", "accumulation": 2}, marks=pytest.mark.slow)], ids=str
)
def test_metrics_have_a_line_an_interval_and_survive_a_stop(tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe = replace(SHORT, **changes)
    losses = train(tmp_path, MetricsLog(tmp_path, every=2), recipe)
    records = read_metrics(tmp_path)
    # Every second step, each validation, and the loss of the steps before it.
    assert [record["step"] for record in records] == [2, 4, 5, 5, 6, 8, 10, 10]
    lines = [record for record in records if "loss" in record]
    assert all(set(line) == {"step", "loss", "learning_rate", "gradient_norm", "tokens_per_second"} for line in lines)
    assert [line["loss"] for line in lines[:2]] == pytest.approx([losses[1], 2 * losses[3] - losses[1]], rel=1e-4)
    assert all(line["gradient_norm"] > 0 and line["tokens_per_second"] > 0 for line in lines)

    # A second run that is stopped at step 9, and resumed from 5, writes each line once.
    with pytest.raises(Stop):
        train(tmp_path / "b", MetricsLog(tmp_path / "b", every=2), recipe, stop_at=9)
    with (tmp_path / "b" / METRICS).open("a") as file:
        file.write('{"step": 9, "lo')
    train(tmp_path / "b", MetricsLog(tmp_path / "b", every=2), recipe)
    again = read_metrics(tmp_path / "b")
    assert [record["step"] for record in again] == [2, 4, 5, 5, 6, 8, 10, 10]
    for ours, theirs in zip(again, records, strict=True):
        for key in ours.keys() - {"tokens_per_second"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4)


def test_a_run_of_one_step_has_a_training_loss(tmp_path: Path) -> None:
    (loss,) = train(tmp_path, MetricsLog(tmp_path, every=10), replace(SHORT, epochs=0.001))
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [1, 1] and records[0]["loss"] == pytest.approx(loss)


def test_the_gradient_norm_is_that_of_the_gradients() -> None:
    from builder.training.optimizers import make_optimizer

    variable = keras.Variable(np.zeros(3, np.float32))
    optimizer = make_optimizer(RECIPE, 10)
    optimizer.build([variable])
    optimizer.apply([tf.constant([3.0, 0.0, -4.0])], [variable])
    assert float(optimizer.gradient_norm) == pytest.approx(5.0)


def test_tensorboard_reads_the_same_figures(tmp_path: Path) -> None:
    train(tmp_path, MetricsLog(tmp_path, every=5, tensorboard=True))
    found = {}
    for path in (tmp_path / TENSORBOARD).iterdir():
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                found[event.step, value.tag] = float(tf.make_ndarray(value.tensor))
    expected = {
        (int(record["step"]), name): value
        for record in read_metrics(tmp_path)
        for name, value in record.items()
        if name != "step"
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_samples_are_the_most_likely_tokens() -> None:
    keras.utils.set_random_seed(3)
    model = LanguageModel.create(GEOMETRY)
    prompts = [[1, 2, 3], [4], list(range(14))]
    for prompt, ours in zip(prompts, Continuations(model, prompts, 5)(), strict=True):
        ids = prompt[-11:]  # Sixteen positions hold eleven tokens of the prompt and five new ones.
        for token in ours:
            assert token == int(np.argmax(model(np.array([ids], np.int32)).numpy()[0, -1]))
            ids = [*ids, token]
        assert len(ours) == 5
    assert Continuations(model, [], 5)() == []


def test_samples_follow_the_weights() -> None:
    model = LanguageModel.create(GEOMETRY)
    continuations = Continuations(model, [[1, 2]], 3)
    for token in (5, 9):
        # A last layer norm of zeros and a bias along one token's embedding leave that token alone.
        model.ln_f.gamma.assign(tf.zeros(16))
        model.ln_f.beta.assign(model.wte.embeddings[token] * 100.0)
        model.wte.embeddings.assign(tf.math.l2_normalize(model.wte.embeddings, -1))
        assert continuations() == [[token] * 3]


def test_the_page_stands_alone_and_shows_every_curve(tmp_path: Path) -> None:
    records: list[dict[str, float]] = [
        {"step": step, "loss": 3.0 / step, "learning_rate": 0.1, "gradient_norm": 1.0, "tokens_per_second": 9.0}
        for step in (1, 2, 3)
    ]
    row = {"step": 3, "train_loss": 1.0, "validation_loss": 1.25, "validation_perplexity": 3.49}
    write_report(
        tmp_path / "r.html", "a<b", ["LoRA of rank <8>"], [*records, {"step": 3, "validation_loss": 1.25}],
        [row | {"validation_accuracy": 0.5}], [("<i>", "\udcff & so")],
    )  # fmt: skip
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count('role="img"') == 4 and page.count("<polyline") == 4 + 2 and page.count("<circle") == 1
    assert "<p>LoRA of rank &lt;8&gt;</p>" in page
    assert "prefers-color-scheme: dark" in page and "&lt;i&gt;" in page and "a&lt;b" in page and "&amp; so" in page
    assert not re.search(r"https?://|src=|@import|<script", page)
    # The first value is the highest and the last the lowest, at the two ends of the axes.
    points = re.findall(r'points="([^"]*)"', page)[2].split()
    assert points[0] == "58.0,12.0" and points[-1] == "628.0,184.0"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (4.863, 7.08, [4, 5, 6, 7, 8]),
        (1361, 99_010, [0, 50_000, 100_000]),
        (0.0005, 0.009997, [0, 0.005, 0.01]),
        (-0.3, 0.1, [-0.3, -0.2, -0.1, 0, 0.1]),
        (1.0, 1.0, [0.5, 1.0, 1.5]),
        (0.0, 0.0, [-1.0, -0.5, 0.0, 0.5, 1.0]),
    ],
)
def test_an_axis_has_round_marks_around_its_values(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)
