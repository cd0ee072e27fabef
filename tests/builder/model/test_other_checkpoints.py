"""Checkpoints as other libraries wrote them give those libraries' logits; what they cannot be is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from builder.data.base_tokenizer import read_base_tokenizer
from builder.model.geometry import read_geometry
from builder.model.gpt2 import GPT2
from builder.model.lora_adapter import LoraAdapter
from builder.model.pretrained import load_weights, resolve_base
from builder.model.weight_matching import check_head, match_weights
from builder.special_tokens import TokenIds
from serving.errors import InputError
from tests.oracles.fixtures import FOLDER as FIXTURES
from tests.oracles.fixtures import max_difference, read_cases

FOLDER = FIXTURES.parent / "checkpoints"
SOURCE = FIXTURES / "odd_heads"
FUNCTIONS = dict(np.load(FOLDER / "functions.npz"))
# The most that was seen is 6e-6.
TOLERANCE = 5e-5


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SOURCE, tmp_path / "base"))


def change(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; `...` deletes one."""
    table = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in table.items() if value is not ...}))


def logits(folder: Path, adapter: Path | None = None) -> tuple[Any, str]:
    model = GPT2.create(read_geometry(folder))
    said = load_weights(model, folder, adapter)
    return model(read_cases("odd_heads")["full"].ids).numpy(), said


def checked(folder: Path) -> None:
    """What is done before any text is read: nothing is allocated for a model."""
    check_head(folder, match_weights(folder, read_geometry(folder)))


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        checked(folder)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("name", ["tf_safetensors", "tf_object", "save_model", "compiled"])
def test_another_way_to_save_the_same_model(name: str) -> None:
    checked(FOLDER / name)
    ours, _ = logits(FOLDER / name)
    assert max_difference(ours, read_cases("odd_heads")["full"].logits) < TOLERANCE


def test_the_fixtures_are_what_they_stand_for() -> None:
    names = {name: set(load_file(FOLDER / name / "model.safetensors")) for name in ("save_model", "compiled")}
    assert "transformer.wte.weight" not in names["save_model"] and "lm_head.weight" in names["save_model"]
    assert all(name.startswith("module._orig_mod.") for name in names["compiled"])
    assert "transformer/h_._0/ln_1/gamma:0" in load_file(FOLDER / "tf_safetensors" / "model.safetensors")


@pytest.mark.parametrize("name", ["keras_hub", "keras_task"])
def test_keras_hub(name: str) -> None:
    checked(FOLDER / name)
    ours, said = logits(FOLDER / name)
    assert max_difference(ours, np.load(FOLDER / "keras_hub" / "logits.npz")["logits"]) < TOLERANCE
    assert said.startswith({"keras_hub": "model.weights.h5", "keras_task": "my.weights.h5"}[name])


def test_a_preset_of_keras_hub_brings_its_tokenizer(tmp_path: Path) -> None:
    preset = Path(shutil.copytree(FOLDER / "keras_hub", tmp_path / "preset"))
    shutil.copytree(FOLDER / "keras_hub_tokenizer", preset, dirs_exist_ok=True)
    base = resolve_base(str(preset))
    assert base.tokenizer == preset / "assets" / "tokenizer" and base.tokenizer / "merges.txt" in base.files()
    theirs = json.loads((FOLDER.parent / "tokenizers" / "chatml_v5" / "ids.json").read_text(encoding="utf-8"))
    ours = read_base_tokenizer(base.tokenizer, base.weights)
    assert ours.ids == TokenIds(268, 268)
    assert ours.tokenizer.encode(theirs["texts"][3]).ids == theirs["ids"][3]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_activations_and_scales(checkpoint: Path, name: str) -> None:
    from tests.oracles.make_checkpoint_fixtures import FUNCTIONS as CHANGES

    change(checkpoint / "config.json", **CHANGES[name])
    ours, said = logits(checkpoint)
    assert max_difference(ours, FUNCTIONS[name]) < TOLERANCE
    assert ("attention's scale" in said) == (name in ("inverse_layer", "unscaled", "both_scales"))
    different = name not in ("gelu_fast", "gelu_pytorch_tanh")
    assert (max_difference(ours, read_cases("odd_heads")["full"].logits) > 1e-3) == different


@pytest.fixture
def adapter(checkpoint: Path) -> Path:
    folder = Path(shutil.copytree(FOLDER / "lora", checkpoint.parent / "adapter"))
    change(folder / "adapter_config.json", base_model_name_or_path=str(checkpoint))
    return folder


def test_an_adapter_is_merged_onto_its_base(adapter: Path, checkpoint: Path) -> None:
    base = resolve_base(str(adapter))
    assert (base.weights, base.tokenizer, base.adapter) == (checkpoint, checkpoint, adapter)
    assert adapter / "adapter_model.safetensors" in base.files() and checkpoint / "config.json" in base.files()
    ours, said = logits(base.weights, base.adapter)
    assert max_difference(ours, np.load(FOLDER / "lora" / "logits.npz")["logits"]) < TOLERANCE
    assert said == "model.safetensors with the adapter adapter (LoRA, rank 3, 8 matrices)"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only 'LORA'"),
        ({"use_dora": True}, "use_dora is set; merge it with PEFT's merge_and_unload"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
        ({"base_model_name_or_path": ...}, "names no base_model_name_or_path"),
    ],
)
def test_adapters_that_cannot_be_merged(adapter: Path, changes: dict[str, Any], words: str) -> None:
    change(adapter / "adapter_config.json", **changes)
    with pytest.raises(InputError, match=words):
        resolve_base(str(adapter))


def test_an_adapter_of_another_model_is_refused(adapter: Path) -> None:
    with pytest.raises(InputError, match=r"the adapter's factors of 'h\.0\.attn\.c_attn\.weight' are"):
        LoraAdapter(adapter, read_geometry(FIXTURES / "bytes"))
    with pytest.raises(InputError, match=r"the adapter has 'h\.1\..*', which is not a weight of the base"):
        LoraAdapter(adapter, read_geometry(FIXTURES / "one_block"))


def with_tensors(folder: Path, changes: dict[str, Any]) -> None:
    """Write the weights with some tensors exchanged; None takes one out."""
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({key: value for key, value in tensors.items() if value is not None}, folder / "model.safetensors")


def test_a_head_that_is_the_embedding_is_accepted(checkpoint: Path) -> None:
    wte = load_file(checkpoint / "model.safetensors")["transformer.wte.weight"]
    with_tensors(checkpoint, {"lm_head.weight": wte.copy()})
    for tied in (True, False, ...):
        change(checkpoint / "config.json", tie_word_embeddings=tied)
        checked(checkpoint)


@pytest.mark.parametrize("tied", [True, False, ...])
def test_a_head_of_its_own_is_refused(checkpoint: Path, tied: Any) -> None:
    change(checkpoint / "config.json", tie_word_embeddings=tied)
    wte = load_file(checkpoint / "model.safetensors")["transformer.wte.weight"]
    with_tensors(checkpoint, {"lm_head.weight": wte + np.float32(0.25)})
    refused(checkpoint, "lm_head.weight differs from wte.weight (by up to 0.25)", "only a head that is tied")
    with_tensors(checkpoint, {"lm_head.weight": np.full_like(wte, np.nan)})
    refused(checkpoint, "lm_head.weight differs from wte.weight (by up to inf)")


def test_an_untied_model_without_its_head_is_refused(checkpoint: Path) -> None:
    change(checkpoint / "config.json", tie_word_embeddings=False)
    refused(checkpoint, "tie_word_embeddings in config.json is false, but there is no lm_head.weight")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_layer": 1}, ["config.json says n_layer 1, but the weights have 2 blocks"]),
        ({"n_layer": 3}, ["config.json says n_layer 3, but the weights have 2 blocks"]),
        ({"n_layer": 10**9}, ["n_layer is 1000000000; it must be at most 10000"]),
        ({"n_positions": 0}, ["n_positions is 0; it must be at least 1"]),
        ({"n_inner": 0}, ["n_inner is 0; it must be at least 1"]),
        ({"n_positions": 2**31 - 1}, ["'transformer.wpe.weight' has shape [21, 15], but config.json makes it"]),
        ({"n_embd": 3 * 10**8}, ["has shape", "config.json makes it"]),
        ({"n_embd": 10**400}, ["n_embd is 1000", "it must be at most"]),
        ({"vocab_size": 51}, ["'transformer.wte.weight' has shape [50, 15], but config.json makes it [51, 15]"]),
    ],
)
def test_sizes_that_the_weights_contradict(checkpoint: Path, changes: dict[str, Any], words: list[str]) -> None:
    change(checkpoint / "config.json", **changes)
    refused(checkpoint, *words)


def test_names_of_another_model_are_told(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({f"gpt.{name}": value for name, value in tensors.items()}, checkpoint / "model.safetensors")
    refused(checkpoint, "is missing (28 in all) in model.safetensors; other tensors there: gpt.transformer.h.0.")


def test_tensors_that_are_left_out_are_told(checkpoint: Path) -> None:
    masks = {"transformer.h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)}
    with_tensors(checkpoint, masks | {"score.weight": np.zeros((2, 15), np.float32)})
    assert logits(checkpoint)[1] == "model.safetensors (left out, not GPT-2's: score.weight)"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_is_never_waited_for(checkpoint: Path, name: str) -> None:
    import os

    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    refused(checkpoint, f"{name}: not a plain file")


def test_a_pickled_checkpoint_of_training_is_told_where_the_conversion_is(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "ckpt.pt")
    refused(checkpoint, "only pickled weights (ckpt.pt)", "docs/checkpoints.md")
