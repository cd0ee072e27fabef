"""Whole builds from bases of other kinds: one end token in every file, every activation in every graph."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from builder.data.token_shards import open_tokens
from builder.model.geometry import read_geometry
from builder.model.weight_matching import weight_shapes
from builder.special_tokens import TokenIds
from serving.bundle import open_bundle
from serving.cli import run
from tests.tiny_build import SETTINGS, Fails, TinyBuild

TOKENIZERS = Path(__file__).parents[2] / "oracles" / "tokenizers"
WITHOUT_SIZES = tuple(each for each in SETTINGS if not each.startswith(("model.", "tokenizer.", "training.epochs")))
FAST = ("training.epochs=0", "export.slots=0", 'export.variants=["int8"]')


def a_base(folder: Path, tokenizer: str, vocab_size: int, **config: Any) -> Path:
    """A tiny model with random weights around a tokenizer that transformers saved."""
    shutil.copytree(TOKENIZERS / tokenizer, folder)
    sizes = {"vocab_size": vocab_size, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 2}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"} | sizes | config))
    random = np.random.default_rng(3)
    shapes = weight_shapes(read_geometry(folder, TokenIds(0, 0)))
    tensors = {name: random.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def built_from(base: Path, corpus: Path, folder: Path, *settings: str) -> TinyBuild:
    ours = TinyBuild(corpus, folder / "runs", folder / "dist", (*WITHOUT_SIZES, *FAST, *settings))
    assert run([*ours.build(), "--base", str(base)]) == 0
    return ours


@pytest.mark.slow
def test_a_chat_model_has_one_end_token_everywhere(
    fresh: TinyBuild, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = a_base(
        tmp_path / "base", "chatml_v457", 271, eos_token_id=269, bos_token_id=268, activation_function="relu",
        scale_attn_by_inverse_layer_idx=True,
    )  # fmt: skip
    (base / "generation_config.json").write_text('{"eos_token_id": 269, "temperature": 0.7, "do_sample": true}')
    records = [
        {"chat": [{"role": role, "content": f"{role} says {number} the list"} for role in ("user", "assistant") * 2]}
        for number in range(60)
    ]
    corpus = tmp_path / "chats.jsonl"
    corpus.write_text("".join(json.dumps(record) + "\n" for record in records))
    ours = built_from(base, corpus, tmp_path, "instruction.messages_field=chat", "instruction.template=chat")
    said = capfd.readouterr().out
    assert "chat template: the recipe's instruction template replaces it" in said
    assert "generation settings kept for transformers: do_sample, temperature" in said
    assert "attention's scale multiplied into the queries" in said
    assert re.search(r"^try it: gpt2-bundle generate \S+ --chat 'user says \d+ the list'$", said, re.MULTILINE)

    ids = open_tokens(ours.run / "prepare" / "tokens" / "train.bin")
    documents = json.loads((ours.run / "prepare" / "prepare.json").read_text())["documents"]["train"]
    # One behind each answer, the last of which ends the document; GPT-2's own end token is not among them.
    assert int((ids == 269).sum()) == 2 * documents and 268 not in ids

    bundle = open_bundle(ours.bundle)
    model = bundle.manifest.model
    assert (model.eos_token_id, model.bos_token_id, model.activation_function) == (269, 268, "relu")
    config = json.loads(bundle.path("config.json").read_text())
    assert (config["eos_token_id"], config["activation_function"]) == (269, "relu")
    assert "scale_attn_by_inverse_layer_idx" not in config
    generation = json.loads(bundle.path("generation_config.json").read_text())
    assert generation == {"temperature": 0.7, "do_sample": True, "bos_token_id": 268, "eos_token_id": 269}
    settings = json.loads(bundle.path("tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|im_end|>" and settings["additional_special_tokens"] == ["<|im_start|>"]
    assert json.loads(bundle.path("ort/fp32/genai_config.json").read_text())["model"]["eos_token_id"] == 269
    reading = json.loads(bundle.path("verification.json").read_text())["transformers"]
    assert reading["chat_template"] == "equal" and reading["tokenizer_class"] == "GPT2Tokenizer"
    stored, weights = load_file(base / "model.safetensors"), load_file(bundle.path("model.safetensors"))
    for name in ("h.1.attn.c_attn.weight", "h.1.attn.c_attn.bias"):
        np.testing.assert_array_equal(weights[f"transformer.{name}"][..., :32] * 2, stored[name][..., :32])
        np.testing.assert_array_equal(weights[f"transformer.{name}"][..., 32:], stored[name][..., 32:])


@pytest.mark.slow
def test_a_word_piece_tokenizer_is_built_but_for_text_in_the_graph(
    fresh: TinyBuild, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = a_base(tmp_path / "base", "bert_v457", 84, eos_token_id=50256, activation_function="gelu")
    ours = built_from(base, fresh.corpus, tmp_path)
    said = capfd.readouterr().out
    assert "left generate_text out of the SavedModel: no graph code for its tokenizer (it is not a BPE)" in said
    assert "config.json: eos_token_id 50256 is not a token of this tokenizer" in said
    bundle = open_bundle(ours.bundle)
    assert bundle.manifest.model.eos_token_id == 3 and bundle.manifest.model.activation_function == "gelu"
    assert "savedmodel/generate_text" not in bundle.manifest.graphs and "savedmodel/score" in bundle.manifest.graphs
    assert run(["generate", str(ours.bundle), "the value", "--max-new-tokens", "4", "--stop", "[SEP]", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["prompt_tokens"] == 2


def test_a_faulty_base_is_told_before_the_text_is_read(fails: Fails, fresh: TinyBuild, tmp_path: Path) -> None:
    base = a_base(tmp_path / "base", "added_v457", 274)
    save_file({"lm_head.weight": np.zeros((274, 32), np.float32)} | load_file(base / "model.safetensors"),
              base / "model.safetensors")  # fmt: skip
    missing = TinyBuild(tmp_path / "no-such-text.txt", tmp_path / "runs", tmp_path / "dist", WITHOUT_SIZES)
    fails([*missing.build(), "--base", str(base)], 2, "no-such-text.txt")
    with_text = TinyBuild(fresh.corpus, tmp_path / "runs", tmp_path / "dist", WITHOUT_SIZES)
    fails([*with_text.build(), "--base", str(base)], 2, "lm_head.weight differs from wte.weight")
    assert not (with_text.run / "prepare" / "corpus").exists()
