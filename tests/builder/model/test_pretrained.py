"""Base checkpoints: what is read, and one sentence for everything that cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from builder.model.geometry import read_geometry
from builder.model.gpt2 import GPT2, named_variables
from builder.model.pretrained import geometry_of, load_weights
from builder.recipe import ModelRecipe
from builder.special_tokens import TokenIds
from builder.stages.train import hf_config
from serving.bundle import Geometry
from serving.errors import InputError
from tests.oracles.fixtures import FOLDER, keras_model, read_cases

INDEX = "model.safetensors.index.json"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER / "bytes", tmp_path / "base"))


def change_config(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; `...` deletes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_weights(GPT2.create(read_geometry(FOLDER / "bytes")), folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def config_refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_geometry(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_geometry_is_read(checkpoint: Path) -> None:
    wanted = Geometry(257, 48, 24, 2, 3, 96, 1e-5, "gelu_new", 256, 256)
    assert read_geometry(checkpoint) == wanted
    change_config(checkpoint, n_positions=..., n_ctx=48, n_inner=None, bos_token_id=None, eos_token_id=...)
    assert read_geometry(checkpoint) == wanted
    change_config(checkpoint, bos_token_id=0, eos_token_id=7, n_inner=10, layer_norm_epsilon=1e-3)
    assert read_geometry(checkpoint) == Geometry(257, 48, 24, 2, 3, 10, 1e-3, "gelu_new", 0, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; only 'gpt2' can be read"),
        ({"model_type": ...}, "model_type is None"),
        ({"n_embd": ...}, "not a GPT-2 configuration"),
        ({"n_layer": "two"}, "not a GPT-2 configuration"),
        ({"eos_token_id": [256]}, "not a GPT-2 configuration"),
        ({"n_layer": 0}, "n_layer is 0; it must be at least 1"),
        ({"n_head": -3}, "n_head is -3; it must be at least 1"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0; it must lie between 0 and 1"),
        ({"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon is -1e-05; it must"),
        ({"layer_norm_epsilon": 1.0}, "layer_norm_epsilon is 1; it must"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan; it must"),
        ({"layer_norm_epsilon": None}, "not a GPT-2 configuration"),
        ({"n_embd": float("inf")}, "not a GPT-2 configuration"),
        ({"n_head": 5}, "n_head 5 does not divide n_embd 24"),
        ({"eos_token_id": 257}, "eos_token_id is 257, outside of the vocabulary of 257"),
        ({"bos_token_id": -1}, "bos_token_id is -1, outside of the vocabulary of 257"),
        ({"activation_function": "swish"}, "activation_function is 'swish'; can be built: gelu_new, gelu_fast"),
        ({"activation_function": ["relu"]}, r"activation_function is \['relu'\]; can be built"),
        ({"auto_map": {"AutoModel": "m.M"}}, "auto_map names code of its own"),
        ({"add_cross_attention": True}, "add_cross_attention is True; only False"),
    ],
)
def test_other_models_are_refused_by_name(checkpoint: Path, changes: dict[str, Any], message: str) -> None:
    change_config(checkpoint, **changes)
    config_refused(checkpoint, message)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe"])
def test_a_broken_config_is_refused(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "config.json").write_bytes(content)
    config_refused(checkpoint, "not a GPT-2 configuration")


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    config_refused(
        tmp_path, r"no config.json \(or OpenAI's hparams.json\) here; name the folder of a whole GPT-2 checkpoint"
    )


def test_weights_are_loaded_with_and_without_prefix(checkpoint: Path) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    # OpenAI's upload: no prefix, and the causal masks beside the weights.
    plain = {key.removeprefix("transformer."): value for key, value in stored.items()}
    save_file(plain | {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)}, checkpoint / "model.safetensors")
    model = GPT2.create(read_geometry(checkpoint))
    load_weights(model, checkpoint)
    for name, variable in named_variables(model):
        np.testing.assert_array_equal(variable.numpy(), stored[name], err_msg=name)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
def test_other_precisions_become_float32(checkpoint: Path, kind: str) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    narrowed = {key: value.astype(np.dtype(kind)) for key, value in stored.items()}
    save_file(narrowed, checkpoint / "model.safetensors")
    model = GPT2.create(read_geometry(checkpoint))
    assert load_weights(model, checkpoint) == "model.safetensors"
    for name, variable in named_variables(model):
        assert variable.dtype == "float32"
        np.testing.assert_array_equal(variable.numpy(), narrowed[name].astype(np.float32), err_msg=name)


def test_quantised_weights_are_refused(checkpoint: Path) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    stored["transformer.h.0.mlp.c_fc.weight"] = stored["transformer.h.0.mlp.c_fc.weight"].astype(np.int8)
    save_file(stored, checkpoint / "model.safetensors")
    refused(checkpoint, r"tensor 'transformer\.h\.0\.mlp\.c_fc\.weight' is int8, which is not a plain float type")


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_weights_that_are_not_numbers_are_refused(checkpoint: Path, value: float) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    stored["transformer.ln_f.bias"][3] = value
    save_file(stored, checkpoint / "model.safetensors")
    refused(checkpoint, r"tensor 'transformer\.ln_f\.bias' holds infinities or not-a-numbers")


def test_a_tensor_that_is_there_twice_is_refused(checkpoint: Path) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    save_file(stored | {"wpe.weight": stored["transformer.wpe.weight"] + 1}, checkpoint / "model.safetensors")
    refused(checkpoint, r"tensor '(transformer\.)?wpe\.weight' is there twice")


def shard(folder: Path) -> list[str]:
    """Split the checkpoint into two files and an index."""
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    places = {key: names[index % 2] for index, key in enumerate(stored)}
    for name in names:
        save_file({key: value for key, value in stored.items() if places[key] == name}, folder / name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return names


def test_shards_are_loaded(checkpoint: Path) -> None:
    shard(checkpoint)
    model = GPT2.create(read_geometry(checkpoint))
    load_weights(model, checkpoint)
    case = read_cases("bytes")["full"]
    np.testing.assert_array_equal(model(case.ids).numpy(), keras_model("bytes")(case.ids).numpy())


def test_a_missing_shard_is_refused(checkpoint: Path) -> None:
    _, second = shard(checkpoint)
    (checkpoint / second).unlink()
    refused(checkpoint, f"'{second}' is named by the index but is not there; fetch it again")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": ["b"]}}'])
def test_a_broken_index_is_refused(checkpoint: Path, content: str) -> None:
    shard(checkpoint)
    (checkpoint / INDEX).write_text(content)
    refused(checkpoint, "not an index of shards; fetch it again")


@pytest.mark.parametrize("name", ["../base.safetensors", "a/b.safetensors", "/etc/hostname", "..", 7])
def test_an_index_may_not_leave_the_folder(checkpoint: Path, name: Any) -> None:
    shutil.copyfile(checkpoint / "model.safetensors", checkpoint.parent / "base.safetensors")
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {"transformer.wte.weight": name}}))
    refused(checkpoint, "is named by the index but is not there|not an index of shards")


def test_a_missing_tensor_is_named(checkpoint: Path) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    del stored["transformer.h.1.mlp.c_fc.bias"], stored["transformer.ln_f.bias"]
    save_file(stored, checkpoint / "model.safetensors")
    refused(checkpoint, r"tensor 'h\.1\.mlp\.c_fc\.bias' is missing \(2 in all\) in model\.safetensors; name ")


def test_another_shape_is_named(checkpoint: Path) -> None:
    stored = load_file(checkpoint / "model.safetensors")
    stored["transformer.wpe.weight"] = np.zeros((7, 24), np.float32)
    save_file(stored, checkpoint / "model.safetensors")
    refused(checkpoint, r"'transformer\.wpe\.weight' has shape \[7, 24\], but config\.json makes it \[48, 24\]")


@pytest.mark.parametrize("content", [b"", b"12345678", b"\xff" * 100])
def test_a_broken_file_is_refused(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "model.safetensors").write_bytes(content)
    refused(checkpoint, r"model\.safetensors: cannot be read .*; fetch it again")


def test_a_truncated_file_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(checkpoint, r"model\.safetensors: cannot be read .*; fetch it again")


def test_pickled_weights_are_never_opened(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    refused(checkpoint, r"only pickled weights \(pytorch_model\.bin\) here, which are never unpickled; convert them")


def test_a_folder_without_weights_is_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    refused(
        checkpoint,
        "no model.safetensors, tf_model.h5 or TensorFlow checkpoint here; name the folder of a whole GPT-2 checkpoint",
    )


def test_a_recipe_decides_the_geometry(checkpoint: Path) -> None:
    own = ModelRecipe(n_positions=32, n_embd=48, n_layer=3, n_head=2)
    assert geometry_of(own, 300, TokenIds(5, 6)) == Geometry(300, 32, 48, 3, 2, 192, 1e-5, "gelu_new", 6, 5)
    assert geometry_of(ModelRecipe(base=str(checkpoint)), 300, TokenIds(256, 256)) == read_geometry(checkpoint)


@pytest.mark.parametrize(("n_embd", "n_head", "padded"), [(60, 5, 16), (48, 2, 24), (15, 3, 8), (8, 8, 8)])
def test_heads_are_padded_to_a_multiple_of_8(n_embd: int, n_head: int, padded: int) -> None:
    geometry = geometry_of(ModelRecipe(n_embd=n_embd, n_head=n_head), 300, TokenIds(5, 5))
    assert geometry.padded_head_dim == padded


def test_the_configuration_names_the_dropouts_of_its_training(checkpoint):
    recipe = ModelRecipe(embd_pdrop=0.1, attn_pdrop=0.2, resid_pdrop=0.3)
    config = hf_config(read_geometry(checkpoint), recipe)
    assert [config[f"{name}_pdrop"] for name in ("embd", "attn", "resid")] == [0.1, 0.2, 0.3]
