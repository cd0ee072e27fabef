"""Checkpoints: whole or not at all, and only ever of the same run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builder.keras_backend import keras, tf
from builder.model.gpt2 import GPT2, named_variables
from builder.training import checkpoints
from builder.training.checkpoints import FILE, Progress, load_checkpoint, save_checkpoint
from tests.oracles.fixtures import keras_model, read_cases

PROGRESS = Progress(3, [{"step": 3, "validation_loss": 1.25}])


def fresh(seed: int, name: str = "one_block") -> tuple[GPT2, Any]:
    geometry = keras_model(name).geometry
    keras.utils.set_random_seed(seed)
    model = GPT2.create(geometry)
    optimizer = keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(0.01, 100))
    optimizer.build(model.trainable_variables)
    return model, optimizer


def train(model: GPT2, optimizer: Any, steps: int) -> None:
    ids = read_cases("one_block")["full"].ids
    for _ in range(steps):
        with tf.GradientTape() as tape:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(ids[:, 1:], model(ids)[:, :-1])
        variables = model.trainable_variables
        values = [variable.value for variable in variables]
        gradients = tape.gradient(losses, values)
        optimizer.apply(gradients, variables)


def state(model: GPT2, optimizer: Any) -> list[Any]:
    variables = [variable for _, variable in named_variables(model)] + optimizer.variables
    return [np.array(variable) for variable in variables]


def same(first: list[Any], second: list[Any]) -> bool:
    return all((a == b).all() and a.dtype == b.dtype for a, b in zip(first, second, strict=True))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, list[Any]]:
    """A checkpoint after three steps of the run "run", and the state that it holds."""
    model, optimizer = fresh(1)
    train(model, optimizer, 3)
    save_checkpoint(tmp_path, model, optimizer, "run", PROGRESS)
    return tmp_path, state(model, optimizer)


def test_resumed_training_is_unbroken_training(saved: tuple[Path, list[Any]]) -> None:
    folder, held = saved
    model, optimizer = fresh(2)
    assert not same(state(model, optimizer), held)
    assert load_checkpoint(folder, model, optimizer, "run") == PROGRESS
    assert same(state(model, optimizer), held)
    assert int(optimizer.iterations) == 3
    train(model, optimizer, 4)
    unbroken = fresh(1)
    train(*unbroken, 7)
    for ours, theirs in zip(state(model, optimizer), state(*unbroken), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def ignored(folder: Path, run_id: str = "run", name: str = "one_block") -> None:
    model, optimizer = fresh(2, name)
    before = state(model, optimizer)
    assert load_checkpoint(folder, model, optimizer, run_id) is None
    assert same(state(model, optimizer), before)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    ignored(tmp_path)
    ignored(tmp_path / "nowhere")


def test_another_run_or_another_model_is_ignored(saved: tuple[Path, list[Any]]) -> None:
    folder, _ = saved
    ignored(folder, run_id="run2")
    ignored(folder, run_id="")
    ignored(folder, name="odd_heads")


def test_another_optimizer_is_ignored(saved: tuple[Path, list[Any]]) -> None:
    model, _ = fresh(2)
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    optimizer.build(model.trainable_variables)
    before = state(model, optimizer)
    assert load_checkpoint(saved[0], model, optimizer, "run") is None
    assert same(state(model, optimizer), before)


def test_the_same_names_in_another_shape_are_ignored(saved: tuple[Path, list[Any]]) -> None:
    model = GPT2.create(replace(keras_model("one_block").geometry, n_positions=17))
    optimizer = keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(0.01, 100))
    optimizer.build(model.trainable_variables)
    before = state(model, optimizer)
    assert load_checkpoint(saved[0], model, optimizer, "run") is None
    assert same(state(model, optimizer), before)


@pytest.mark.parametrize("damage", ["empty", "cut", "cut header", "garbage"])
def test_a_broken_file_is_ignored(saved: tuple[Path, list[Any]], damage: str) -> None:
    path = saved[0] / FILE
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": data[:-1], "cut header": data[:50], "garbage": b"\xff" * 500}[damage])
    ignored(saved[0])


def test_a_save_that_dies_leaves_the_old_one(saved: tuple[Path, list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, held = saved
    whole = checkpoints.save_file

    def dies(arrays: Any, path: Path, metadata: Any) -> None:
        whole(arrays, path, metadata=metadata)
        path.write_bytes(path.read_bytes()[:1000])
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_file", dies)
    model, optimizer = fresh(3)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(folder, model, optimizer, "run", Progress(9, []))
    assert load_checkpoint(folder, model, optimizer, "run") == PROGRESS
    assert same(state(model, optimizer), held)
    monkeypatch.undo()
    save_checkpoint(folder, model, optimizer, "run", Progress(9, []))
    assert load_checkpoint(folder, model, optimizer, "run") == Progress(9, [])
    assert [path.name for path in folder.iterdir()] == [FILE]


def test_weights_lie_under_their_hugging_face_names(saved: tuple[Path, list[Any]]) -> None:
    from safetensors import safe_open

    with safe_open(saved[0] / FILE, "np") as file:
        names = set(file.keys())
    assert {name for name, _ in named_variables(keras_model("one_block"))} <= names
    assert all(name.startswith(("transformer.", "optimizer.")) for name in names)


def test_older_ones_of_another_run_are_not_kept(saved: tuple[Path, list[Any]]) -> None:
    folder, _ = saved
    model, optimizer = fresh(2)
    for run_id, steps in (("run", (6, 900)), ("other", (1, 2, 3))):
        for step in steps:
            save_checkpoint(folder, model, optimizer, run_id, Progress(step, []), kept=2)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-000000002.safetensors", FILE]
    assert load_checkpoint(folder, model, optimizer, "run") is None
    assert load_checkpoint(folder, model, optimizer, "other") == Progress(3, [])
