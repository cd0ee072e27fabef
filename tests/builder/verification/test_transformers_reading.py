"""The certificate's block of transformers: it passes what is written here, and names each difference."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from builder.data.base_tokenizer import read_base_tokenizer, write_base_tokenizer
from builder.data.instructions import Template
from builder.data.tokenizer import add_chat_template, train_tokenizer
from builder.recipe import InstructionRecipe, ModelRecipe, TokenizerRecipe
from builder.special_tokens import read_token_ids
from builder.stages.train import hf_config
from builder.verification.transformers_reading import check_reading
from serving.bundle import Geometry
from serving.errors import ParityError

FOLDER = Path(__file__).parents[2] / "oracles" / "tokenizers"
NAMES = sorted(path.name for path in FOLDER.iterdir())
GOLDEN = {"prompts": [[1, 2, 3], [40, 50, 60, 70, 80]], "text": list(range(80))}
INSTRUCTION = InstructionRecipe(prompt_field="prompt", response_field="response", template="chat")


def a_bundle(folder: Path, instruction: InstructionRecipe | None = None) -> Any:
    """What of a bundle the block looks at, around the tokenizer in `folder`."""
    ids = read_token_ids(folder)
    geometry = Geometry(512, 48, 32, 2, 2, 100, 1e-5, "relu", ids.bos, ids.eos)
    (folder / "config.json").write_text(json.dumps(hf_config(geometry, ModelRecipe(), ids.pad)))
    provenance = SimpleNamespace(recipe={"instruction": asdict(instruction or InstructionRecipe())})
    return SimpleNamespace(folder=folder, manifest=SimpleNamespace(model=geometry, provenance=provenance))


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes))


@pytest.mark.parametrize("name", NAMES)
def test_every_tokenizer_that_is_taken_over_passes(name: str, tmp_path: Path) -> None:
    write_base_tokenizer(read_base_tokenizer(FOLDER / name, FOLDER / name), 48, tmp_path)
    record = check_reading(a_bundle(tmp_path), GOLDEN)
    assert record["texts"] > 20
    assert record["chat_template"] == ("rendered" if name in ("chatml_v457", "chatml_v5") else "none")


def test_the_class_that_drops_a_pre_tokenizer_is_found_out(tmp_path: Path) -> None:
    write_base_tokenizer(read_base_tokenizer(FOLDER / "digits_v5", FOLDER / "digits_v5"), 48, tmp_path)
    change(tmp_path / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    with pytest.raises(ParityError, match=r"failed in tokenizer_config\.json: as transformers reads it, the text '"):
        check_reading(a_bundle(tmp_path), GOLDEN)


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("config.json", {"n_head": 4}, "config.json: as transformers reads it, n_head is 4, not 2"),
        ("config.json", {"activation_function": "gelu"}, "activation_function is 'gelu', not 'relu'"),
        ("config.json", {"scale_attn_weights": False}, "scale_attn_weights is False, not True"),
        ("config.json", {"pad_token_id": 3}, "config.json: as transformers reads it, pad_token_id is 3, not 269"),
        ("special_tokens_map.json", {"eos_token": "<user>"}, "tokenizer_config.json: .* eos_token_id is 270, not 268"),
        ("special_tokens_map.json", {"bos_token": None}, "bos_token_id is None, not 268"),
        ("tokenizer_config.json", {"additional_special_tokens": ["<new>"]}, "has 275 entries, not 274"),
    ],
)
def test_a_difference_is_named(tmp_path: Path, file: str, changes: dict[str, Any], words: str) -> None:
    write_base_tokenizer(read_base_tokenizer(FOLDER / "added_v5", FOLDER / "added_v5"), 48, tmp_path)
    bundle = a_bundle(tmp_path)
    change(tmp_path / file, **changes)
    with pytest.raises(ParityError, match=words):
        check_reading(bundle, GOLDEN)


def test_settings_that_do_not_load_are_named(tmp_path: Path) -> None:
    write_base_tokenizer(read_base_tokenizer(FOLDER / "added_v5", FOLDER / "added_v5"), 48, tmp_path)
    bundle = a_bundle(tmp_path)
    change(tmp_path / "config.json", n_layer="two")
    with pytest.raises(ParityError, match=r"config\.json: as transformers reads it, does not load|tokenizer_config"):
        check_reading(bundle, GOLDEN)


def test_the_chat_template_gives_the_text_of_training(tmp_path: Path) -> None:
    train_tokenizer(["User: why? Assistant: because."] * 5, TokenizerRecipe(vocab_size=280), 48, tmp_path)
    bundle = a_bundle(tmp_path, INSTRUCTION)
    template = Template.of(INSTRUCTION).chat_template()
    add_chat_template(tmp_path, template)
    assert check_reading(bundle, GOLDEN)["chat_template"] == "equal"
    add_chat_template(tmp_path, template.replace("User", "Human"))
    with pytest.raises(ParityError, match=r"tokenizer_config\.json: as transformers reads it, the chat template gives"):
        check_reading(bundle, GOLDEN)


@pytest.mark.parametrize("roles", [{}, {"eos_token": "</s>", "pad_token": "</s>"}])
def test_an_end_token_of_the_vocabulary_alone_passes(tmp_path: Path, roles: dict[str, str]) -> None:
    base = tmp_path / "base"
    base.mkdir()
    vocab = json.loads((FOLDER / "added_v430" / "vocab.json").read_text(encoding="utf-8"))
    del vocab["<|endoftext|>"]
    (base / "vocab.json").write_text(json.dumps(vocab | {"</s>": len(vocab)}))
    (base / "merges.txt").write_bytes((FOLDER / "added_v430" / "merges.txt").read_bytes())
    (base / "config.json").write_text('{"model_type": "gpt2", "eos_token_id": 268}')
    (base / "tokenizer_config.json").write_text(json.dumps(roles))
    out = tmp_path / "out"
    write_base_tokenizer(read_base_tokenizer(base, base, 269), 48, out)
    assert check_reading(a_bundle(out), GOLDEN)["tokenizer_class"] == "GPT2Tokenizer"
