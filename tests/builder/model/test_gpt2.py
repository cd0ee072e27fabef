"""The Keras GPT-2 is the GPT-2 of Hugging Face's PyTorch: logits, names and shapes, and checkpoints both ways."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from builder.keras_backend import keras, tf
from builder.model.geometry import read_geometry
from builder.model.gpt2 import GPT2, named_variables
from builder.model.pretrained import load_weights
from builder.model.safetensors_file import write_safetensors
from tests.oracles.fixtures import FOLDER, NAMES, keras_model, max_difference, read_cases

TOLERANCE = 1e-4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["full", "right"])
def test_logits_are_pytorchs(name: str, kind: str) -> None:
    case = read_cases(name)[kind]
    logits = keras_model(name)(case.ids)
    assert logits.dtype == tf.float32
    difference = max_difference(logits, case.logits, case.mask)
    assert difference < TOLERANCE, difference
    assert (logits.numpy().argmax(-1) == case.logits.argmax(-1))[case.mask > 0].all()


@pytest.mark.parametrize("name", NAMES)
def test_fixtures_can_tell_models_apart(name: str) -> None:
    case = read_cases(name)["full"]
    assert len(np.unique(case.logits.argmax(-1))) > 3
    assert case.logits.std() > 1
    for variable_name, variable in named_variables(keras_model(name)):
        assert np.std(variable.numpy()) > 0.01, variable_name


@pytest.mark.parametrize("name", NAMES)
def test_named_variables_are_the_checkpoint(name: str) -> None:
    model = keras_model(name)
    named = dict(named_variables(model))
    assert len(named) == len(named_variables(model))
    stored = load_file(FOLDER / name / "model.safetensors")
    assert {key: tuple(value.shape) for key, value in named.items()} == {
        key: value.shape for key, value in stored.items()
    }
    for key, value in stored.items():
        np.testing.assert_array_equal(named[key].numpy(), value, err_msg=key)
    assert {id(variable) for variable in named.values()} == {id(variable) for variable in model.trainable_variables}
    assert sum(value.size for value in stored.values()) == model.geometry.parameters == model.count_params()


def test_names_are_in_layer_order() -> None:
    names = [name for name, _ in named_variables(keras_model("deep"))]
    layers = [int(name.split(".")[2]) for name in names if ".h." in name]
    assert names[:2] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert layers == sorted(layers) and layers[-1] == 5
    assert names[-2:] == ["transformer.ln_f.weight", "transformer.ln_f.bias"]


def test_positions_may_be_given() -> None:
    model, case = keras_model("bytes"), read_cases("bytes")["full"]
    ids = case.ids[:, :8]
    counted = model(ids).numpy()
    given = model(ids, position_ids=np.broadcast_to(np.arange(8), ids.shape)).numpy()
    np.testing.assert_array_equal(counted, given)
    shifted = model(ids, position_ids=np.broadcast_to(np.arange(1, 9), ids.shape)).numpy()
    assert np.abs(shifted - counted).max() > 0.1


def test_a_token_sees_none_that_follows() -> None:
    model, case = keras_model("wide_heads"), read_cases("wide_heads")["full"]
    changed = case.ids.copy()
    changed[:, 10:] = (changed[:, 10:] + 1) % model.geometry.vocab_size
    before, after = model(case.ids).numpy(), model(changed).numpy()
    np.testing.assert_allclose(before[:, :10], after[:, :10], atol=1e-5)
    assert (np.abs(before[:, 10:] - after[:, 10:]).max(-1) > 0.01).all()


@pytest.mark.parametrize("rate", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_each_dropout_is_active_in_training_only(rate: str) -> None:
    keras.utils.set_random_seed(7)
    plain = keras_model("odd_heads")
    ids = read_cases("odd_heads")["full"].ids
    model = GPT2.create(plain.geometry, **{rate: 0.5})
    load_weights(model, FOLDER / "odd_heads")
    expected = plain(ids).numpy()
    np.testing.assert_array_equal(model(ids).numpy(), expected)
    np.testing.assert_array_equal(model(ids, training=False).numpy(), expected)
    first, second = (model(ids, training=True).numpy() for _ in range(2))
    assert np.abs(first - expected).max() > 0.1
    assert np.abs(first - second).max() > 0.1
    np.testing.assert_array_equal(plain(ids, training=True).numpy(), expected)


def test_dropouts_keep_the_mean() -> None:
    """Kept values are scaled up by 1 / (1 - rate), so the mean over many draws of the first norm's input stays."""
    keras.utils.set_random_seed(7)
    layer = GPT2.create(keras_model("one_block").geometry, embd_pdrop=0.25).dropout
    dropped = layer(tf.ones([400, 400]), training=True).numpy()
    np.testing.assert_allclose(np.unique(dropped), [0.0, 1 / 0.75], rtol=1e-6)
    # 160,000 draws: the standard error of the mean is 0.0014.
    assert abs(dropped.mean() - 1) < 0.007


def test_the_seed_decides_the_first_weights() -> None:
    geometry = keras_model("one_block").geometry

    def weights(seed: int) -> list[Any]:
        keras.utils.set_random_seed(seed)
        return [variable.numpy() for _, variable in named_variables(GPT2.create(geometry))]

    first, again, other = weights(1), weights(1), weights(2)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert not (first[0] == other[0]).all()


def test_gradients_reach_every_weight() -> None:
    model = keras_model("deep")
    case = read_cases("deep")["full"]
    with tf.GradientTape() as tape:
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(case.ids[:, 1:], model(case.ids)[:, :-1])
        loss = tf.reduce_mean(losses)
    named = named_variables(model)
    gradients = tape.gradient(loss, [variable.value for _, variable in named])
    for (name, _), gradient in zip(named, gradients, strict=True):
        assert gradient is not None, name
        assert float(tf.reduce_max(tf.abs(tf.convert_to_tensor(gradient)))) > 0, name


@pytest.mark.oracle
@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_our_checkpoint(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    keras.utils.set_random_seed(11)
    model = GPT2.create(keras_model(name).geometry)
    for _, variable in named_variables(model):
        variable.assign_add(0.1 * np.random.default_rng(3).standard_normal(variable.shape))
    write_safetensors(model, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **asdict(model.geometry)}))
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not set(report["missing_keys"]) - {"lm_head.weight"} and not report["unexpected_keys"], report
    ids = read_cases(name)["full"].ids
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(ids)).logits.numpy()
    difference = max_difference(model(ids), expected)
    assert difference < TOLERANCE, difference


@pytest.mark.oracle
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_we_load_a_checkpoint_of_transformers(options: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    geometry = replace(keras_model("bytes").geometry, n_layer=3, n_inner=60)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**asdict(geometry))).eval().to(getattr(torch, dtype))
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    theirs.save_pretrained(tmp_path, **options)
    assert (tmp_path / "model.safetensors.index.json").is_file() == bool(options)
    model = GPT2.create(read_geometry(tmp_path))
    assert model.geometry == geometry
    load_weights(model, tmp_path)
    ids = read_cases("bytes")["full"].ids
    with torch.no_grad():
        expected = theirs.float()(torch.tensor(ids)).logits.numpy()
    difference = max_difference(model(ids), expected)
    assert difference < TOLERANCE, difference


def test_our_file_is_marked_as_transformers_marks_it(tmp_path: Path) -> None:
    write_safetensors(keras_model("one_block"), tmp_path / "ours.safetensors")
    theirs = FOLDER / "one_block" / "model.safetensors"
    with safe_open(tmp_path / "ours.safetensors", "np") as ours, safe_open(theirs, "np") as file:
        assert ours.metadata() == file.metadata() == {"format": "pt"}
