"""Base checkpoints that do not fit, are not whole or are not there: refused in one line before any training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_build import Fails, TinyBuild


@pytest.fixture
def base(built: TinyBuild, tmp_path: Path) -> Path:
    """A folder with a whole checkpoint, to be spoilt."""
    folder = tmp_path / "base"
    folder.mkdir()
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
    for name in names:
        shutil.copyfile(built.bundle / name, folder / name)
    return folder


def change_config(base: Path, **values: Any) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | values))


def only_bin(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def cut(base: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_a_tensor(base: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    del tensors["transformer.ln_f.weight"]
    save_file(tensors, base / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda base: shutil.rmtree(base), ["no such folder"]),
        (lambda base: (base / "model.safetensors").unlink(), ["no model.safetensors, tf_model.h5 or"]),
        (only_bin, ["pickled weights"]),
        (cut, ["cannot be read"]),
        (lambda base: (base / "model.safetensors").write_bytes(b""), ["cannot be read"]),
        (lambda base: (base / "model.safetensors").write_bytes(bytes(range(256)) * 9), ["cannot be read"]),
        (without_a_tensor, ["'ln_f.weight' is missing"]),
        (lambda base: change_config(base, n_embd=64), ["has shape"]),
        (lambda base: change_config(base, n_layer=3), ["n_layer 3, but the weights have 2 blocks"]),
        (lambda base: change_config(base, n_head=3), ["n_head"]),
        (lambda base: change_config(base, n_positions=16), ["sequence_length"]),
        (lambda base: change_config(base, vocab_size=200), ["'transformer.wte.weight' has shape [300, 32]"]),
        (lambda base: change_config(base, model_type="llama"), ["'llama'"]),
        (lambda base: change_config(base, activation_function="swish"), ["activation_function is 'swish'"]),
        (lambda base: change_config(base, n_layer=10**9), ["n_layer is 1000000000; it must be at most"]),
        (lambda base: change_config(base, n_positions=0), ["n_positions is 0"]),
        (lambda base: change_config(base, layer_norm_epsilon=0), ["layer_norm_epsilon is 0"]),
        (lambda base: change_config(base, n_embd="wide"), ["config.json"]),
        (lambda base: change_config(base, n_embd=-32), ["config.json"]),
        (lambda base: change_config(base, n_embd=0), ["config.json"]),
        (
            lambda base: change_config(base, eos_token_id=5000),
            ["eos_token_id in config.json is 5000"],
        ),
        (lambda base: (base / "config.json").write_text("{"), ["config.json"]),
        (lambda base: (base / "config.json").write_text("[]"), ["config.json"]),
        (lambda base: (base / "config.json").write_bytes(bytes(range(256))), ["config.json"]),
        (lambda base: (base / "config.json").unlink(), ["no config.json"]),
        (lambda base: (base / "tokenizer.json").write_text("{"), ["tokenizer"]),
    ],
)
def test_bases(fails: Fails, built: TinyBuild, base: Path, tmp_path: Path, spoil: Any, words: list[str]) -> None:
    settings = tuple(each for each in built.settings if not each.startswith(("model.", "tokenizer.")))
    tiny = TinyBuild(built.corpus, tmp_path / "runs", tmp_path / "dist", settings)
    spoil(base)
    fails([*tiny.build(), "--base", str(base)], 2, *words)
    assert not tiny.dist.exists() or list(tiny.dist.iterdir()) == []


def test_a_base_that_the_hub_does_not_have(fails: Fails, fresh: TinyBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    settings = tuple(each for each in fresh.settings if not each.startswith(("model.", "tokenizer.")))
    tiny = TinyBuild(fresh.corpus, fresh.runs, fresh.dist, settings)
    for name in ("nobody/no-such-gpt2-here", "nobody-gpt2", "two words", "a/b/c"):
        fails([*tiny.build(), "--base", name], 2, name)
