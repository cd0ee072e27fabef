"""A bundle's weights as other servers read them: a GGUF file, or a Hugging Face folder that transformers serves.

Both get a vocabulary in which every id has a text, so that each token is an event of a stream: a bundle with GPT-2's
geometry and a tokenizer of its own may have ids without one. Neither has an end of text that random weights would come
upon.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from serving.bundle import open_bundle
from serving.gguf import vocabulary as gguf_vocabulary
from serving.gguf import write_gguf

_NORMAL = 1
"""GGUF's type of a token that is text."""


def vocabulary(bundle: Path) -> list[str]:
    """The token of each id of the model; those that the tokenizer lacks are named by their ids."""
    known: dict[str, int] = json.loads((bundle / "vocab.json").read_text(encoding="utf-8"))
    size: int = json.loads((bundle / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    names = {index: token for token, index in known.items()}
    return [names.get(index, f"<{index}>") for index in range(size)]


def write_folder(bundle: Path, folder: Path) -> None:
    """A Hugging Face folder with the bundle's own weights, by a link."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    config |= {"bos_token_id": None, "eos_token_id": None}
    _write(folder / "config.json", config)
    _write(folder / "generation_config.json", {"do_sample": False, "pad_token_id": 0})
    tokenizer = json.loads((bundle / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"] = {token: index for index, token in enumerate(vocabulary(bundle))}
    tokenizer["added_tokens"] = []
    _write(folder / "tokenizer.json", tokenizer)
    _write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1024})
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors").symlink_to((bundle / "model.safetensors").absolute())


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_model(bundle: Path, path: Path, outtype: str) -> None:
    """A GGUF file with every id a text and the last id as the end."""
    opened = open_bundle(bundle, check="sizes")
    entries = gguf_vocabulary(opened)
    size = opened.manifest.model.vocab_size
    entries |= {
        "tokenizer.ggml.token_type": [_NORMAL] * size,
        "tokenizer.ggml.bos_token_id": size - 1,
        "tokenizer.ggml.eos_token_id": size - 1,
    }
    write_gguf(opened, path, outtype, entries)
