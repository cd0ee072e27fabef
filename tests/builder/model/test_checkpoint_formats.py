"""Weights in each layout that GPT-2 comes in give the logits that PyTorch computed; broken ones are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from builder.model.geometry import read_geometry
from builder.model.gpt2 import GPT2, named_variables
from builder.model.pretrained import load_weights
from builder.model.weight_names import stored_names
from serving.bundle import Geometry
from serving.errors import InputError
from tests.oracles.fixtures import FOLDER, NAMES, keras_model, max_difference, read_cases
from tests.oracles.layouts import as_type, h5_tensors, openai_tensors, write_checkpoint, write_h5, write_openai

# The geometries that hparams.json can say: an inner width of four times n_embd and an epsilon of 1e-5.
OPENAI_NAMES = ("odd_heads", "bytes")
# 1.4e-5 is the most that was seen, the same to a bit in every layout.
TOLERANCE = 5e-5


def loaded(folder: Path) -> tuple[Any, str]:
    model = GPT2.create(read_geometry(folder))
    return model, load_weights(model, folder)


def same_logits(folder: Path, name: str, label: str) -> None:
    model, said = loaded(folder)
    assert said == label
    for kind in ("full", "right"):  # Padding on the left would need a mask.
        case = read_cases(name)[kind]
        assert max_difference(model(case.ids), case.logits, case.mask) < TOLERANCE
    for (key, ours), (_, theirs) in zip(named_variables(model), named_variables(keras_model(name)), strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy(), err_msg=key)


def config_only(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copyfile(FOLDER / name / "config.json", folder / "config.json")
    return folder


def refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        loaded(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_h5(tmp_path: Path, name: str) -> None:
    write_h5(config_only(tmp_path, name) / "tf_model.h5", h5_tensors(name))
    with h5py.File(tmp_path / "tf_model.h5") as file:
        assert "transformer/tfgpt2lm_head_model/transformer/h_._0/attn/c_attn/weight:0" in file
        assert file["transformer/tfgpt2lm_head_model/transformer/h_._0/attn/c_attn/bias:0"].shape[0] == 1
    same_logits(tmp_path, name, "tf_model.h5")


@pytest.mark.parametrize(("model", "wte"), [("tfgp_t2lm_head_model", "weight:0"), ("tfgpt2model_1", "embeddings:0")])
def test_h5_of_other_versions(tmp_path: Path, model: str, wte: str) -> None:
    write_h5(config_only(tmp_path, "deep") / "tf_model.h5", h5_tensors("deep", model, wte))
    same_logits(tmp_path, "deep", "tf_model.h5")


def test_h5_in_shards(tmp_path: Path) -> None:
    tensors = h5_tensors("deep")
    places: dict[str, str] = {}
    for number, keys in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
        path = config_only(tmp_path, "deep") / f"tf_model-{number:05}-of-00002.h5"
        with h5py.File(path, "w") as file:
            for key in keys:
                file.create_dataset(key.partition("/")[2], data=tensors[key])
        places |= dict.fromkeys(keys, path.name)
    (tmp_path / "tf_model.h5.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    same_logits(tmp_path, "deep", "tf_model.h5 in 2 shards")


@pytest.mark.parametrize("name", OPENAI_NAMES)
def test_openai(tmp_path: Path, name: str) -> None:
    write_openai(tmp_path, name)
    files = {path.name for path in tmp_path.iterdir()}
    assert files >= {"checkpoint", "model.ckpt.index", "model.ckpt.data-00000-of-00001", "model.ckpt.meta"}
    assert read_geometry(tmp_path) == read_geometry(FOLDER / name)
    same_logits(tmp_path, name, "TensorFlow checkpoint model.ckpt")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OPENAI_NAMES])
def test_a_tensorflow_checkpoint_with_a_config(tmp_path: Path, name: str) -> None:
    write_checkpoint(config_only(tmp_path, name), openai_tensors(name), "model-500")
    same_logits(tmp_path, name, "TensorFlow checkpoint model-500")


def test_a_checkpoint_of_a_later_training_is_found_by_its_state(tmp_path: Path) -> None:
    """Tools that fine-tune OpenAI's release leave many; `checkpoint` says the last, in the folder it was written to."""
    write_openai(tmp_path, "bytes")
    write_checkpoint(tmp_path, as_type(openai_tensors("bytes"), "float32") | {"step": np.float32(3)}, "model-7")
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "/somewhere/else/model-7"\n')
    same_logits(tmp_path, "bytes", "TensorFlow checkpoint model-7")
    (tmp_path / "checkpoint").unlink()
    refused(tmp_path, "2 TensorFlow checkpoints and no file 'checkpoint' to say which")
    for path in tmp_path.glob("model-7.*"):
        path.unlink()
    same_logits(tmp_path, "bytes", "TensorFlow checkpoint model.ckpt")


def test_of_several_kinds_safetensors_come_first_then_h5(tmp_path: Path) -> None:
    folder = write_openai(tmp_path, "bytes")
    shutil.copyfile(FOLDER / "bytes" / "model.safetensors", folder / "model.safetensors")
    write_h5(folder / "tf_model.h5", h5_tensors("bytes"))
    (folder / "pytorch_model.bin").write_bytes(b"x")
    for name, label in (("model.safetensors", "model.safetensors"), ("tf_model.h5", "tf_model.h5")):
        assert loaded(folder)[1] == label
        (folder / name).unlink()
    assert loaded(folder)[1] == "TensorFlow checkpoint model.ckpt"


@pytest.mark.parametrize("kind", ["float16", "float64"])
def test_h5_of_another_precision(tmp_path: Path, kind: str) -> None:
    narrowed = as_type(h5_tensors("bytes"), kind)
    write_h5(config_only(tmp_path, "bytes") / "tf_model.h5", narrowed)
    model, _ = loaded(tmp_path)
    stored = narrowed["tfgpt2lm_head_model/transformer/wte/weight:0"]
    np.testing.assert_array_equal(model.wte.embeddings.numpy(), stored.astype(np.float32))


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_a_checkpoint_of_half_precision(tmp_path: Path, kind: str) -> None:
    narrowed = as_type(openai_tensors("bytes"), kind)
    write_checkpoint(config_only(tmp_path, "bytes"), narrowed)
    model, _ = loaded(tmp_path)
    kernel = model.blocks[1].c_fc.kernel.numpy()
    np.testing.assert_array_equal(kernel, narrowed["model/h1/mlp/c_fc/w"][0].astype(np.float32))


@pytest.fixture(params=["h5", "openai"])
def spoil(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Write the fixture "bytes" with some tensors exchanged (None: left out), in one layout or the other."""
    make = {"h5": h5_tensors, "openai": openai_tensors}[request.param]

    def write(changes: dict[str, Any]) -> Path:
        tensors = make("bytes")
        for canonical, value in changes.items():
            layout = "h5" if request.param == "h5" else "checkpoint"
            (key,) = [each for each in tensors if each.endswith(stored_names(layout, canonical)[0])]  # type: ignore
            del tensors[key]
            if value is not None:
                tensors[key] = value
        config_only(tmp_path, "bytes")
        if request.param == "h5":
            write_h5(tmp_path / "tf_model.h5", tensors)
        else:
            write_checkpoint(tmp_path, tensors)
        return tmp_path

    return write


def test_a_missing_tensor_is_named(spoil: Callable[[dict[str, Any]], Path]) -> None:
    folder = spoil({"h.1.attn.c_attn.bias": None, "ln_f.weight": None})
    refused(folder, r"tensor '(h_\._1/attn/c_attn/bias:0|model/h1/attn/c_attn/b)' is missing \(2 in all\)")


def test_another_shape_is_named(spoil: Callable[[dict[str, Any]], Path]) -> None:
    folder = spoil({"wpe.weight": np.zeros((7, 24), np.float32)})
    refused(folder, r"tensor '(wpe/embeddings:0|model/wpe)' has shape \[7, 24\], but config\.json makes it \[48, 24\]")


def test_two_in_front_are_not_one(spoil: Callable[[dict[str, Any]], Path]) -> None:
    folder = spoil({"h.0.mlp.c_fc.weight": np.zeros((2, 24, 96), np.float32)})
    refused(folder, r"has shape \[2, 24, 96\], but config\.json makes it \[24, 96\]")


def test_whole_numbers_are_refused(spoil: Callable[[dict[str, Any]], Path]) -> None:
    refused(spoil({"ln_f.bias": np.zeros(24, np.int32)}), "is int32, which is not a plain float")


@pytest.mark.parametrize("keep", [0, 7, 800, 0.5, -1])
@pytest.mark.parametrize("name", ["tf_model.h5", "model.ckpt.index", "model.ckpt.data-00000-of-00001"])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, name: str, keep: float) -> None:
    config_only(tmp_path, "bytes")
    if name == "tf_model.h5":
        write_h5(tmp_path / name, h5_tensors("bytes"))
    else:
        write_checkpoint(tmp_path, openai_tensors("bytes"))
    path = tmp_path / name
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep == 0.5 else int(keep)])
    refused(tmp_path, r"(tf_model\.h5|model\.ckpt): cannot be read .*; fetch it again")


def test_a_flipped_bit_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = write_openai(tmp_path, "bytes")
    path = folder / "model.ckpt.data-00000-of-00001"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused(folder, r"model\.ckpt: cannot be read .*; fetch it again")


@pytest.mark.parametrize("part", ["index", "data-00000-of-00001"])
def test_a_part_that_is_not_there_is_refused(tmp_path: Path, part: str) -> None:
    folder = write_openai(tmp_path, "bytes")
    (folder / f"model.ckpt.{part}").unlink()
    refused(folder, "is not there; fetch it|cannot be read")


@pytest.mark.parametrize("content", [b"", b"x", b"\xff\xfe"])
def test_a_broken_state_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = write_openai(tmp_path, "bytes")
    (folder / "checkpoint").write_bytes(content)
    refused(folder, "checkpoint: (names no model_checkpoint_path|cannot be read)")


@pytest.mark.parametrize("link", ["external", "raw", "virtual"])
def test_h5_may_not_reach_into_other_files(tmp_path: Path, link: str) -> None:
    config_only(tmp_path, "bytes")
    tensors = h5_tensors("bytes")
    key = "tfgpt2lm_head_model/transformer/ln_f/beta:0"
    value = tensors.pop(key)
    write_h5(tmp_path / "tf_model.h5", tensors)
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["a"] = value
    (tmp_path / "raw").write_bytes(value.tobytes())
    with h5py.File(tmp_path / "tf_model.h5", "a") as file:
        group = file["transformer"]
        if link == "external":
            group[key] = h5py.ExternalLink("other.h5", "a")
        elif link == "raw":
            group.create_dataset(key, value.shape, value.dtype, external=[(str(tmp_path / "raw"), 0, value.nbytes)])
        else:
            layout = h5py.VirtualLayout(value.shape, value.dtype)
            layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "a", value.shape)
            group.create_virtual_dataset(key, layout)
    refused(tmp_path, r"'ln_f/beta:0' (is missing|is kept in another file, which is not opened)")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 5}, "n_head 5 does not divide n_embd 24"),
        ({"n_layer": 0}, "n_layer is 0"),
        ({"n_layer": 3}, r"hparams\.json says n_layer 3, but the weights have 2 blocks"),
        ({"n_ctx": 40}, r"'model/wpe' has shape \[48, 24\], but hparams\.json makes it \[40, 24\]"),
        ({"n_vocab": "many"}, r"hparams\.json: not a GPT-2 configuration"),
    ],
)
def test_hparams_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    refused(write_openai(tmp_path, "bytes", **changes), message)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}"])
def test_broken_hparams(tmp_path: Path, content: str) -> None:
    write_openai(tmp_path, "bytes")
    (tmp_path / "hparams.json").write_text(content)
    refused(tmp_path, r"hparams\.json: not a GPT-2 configuration")


def test_the_smallest_release(tmp_path: Path) -> None:
    (tmp_path / "hparams.json").write_text(
        '{"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}'
    )
    assert read_geometry(tmp_path) == Geometry(50257, 1024, 768, 12, 12, 3072, 1e-5, "gelu_new", 50256, 50256)
