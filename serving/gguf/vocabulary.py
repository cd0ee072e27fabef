"""A bundle's tokenizer as GGUF's metadata: the byte-level BPE that llama.cpp knows as "gpt2"."""

from __future__ import annotations

import json
from typing import Any

from serving.bundle import TOKENIZER_NAME, Bundle
from serving.bundle.model_settings import chat_template_source, end_ids
from serving.bundle.strict_json import refuse
from serving.bundle.tokenizer_file import MAX_BYTES, check_tokenizer
from serving.errors import BundleError
from serving.gguf.file_format import Value

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
# Options of a BPE that llama.cpp's "gpt2" lacks.
_OPTIONS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges", "byte_fallback")


def vocabulary(bundle: Bundle) -> dict[str, Value]:
    """The keys `tokenizer.*` for the tokenizer, the special tokens and the chat template of `bundle`.

    Ids of the model without a token get one of the type "unused". Raises BundleError for a tokenizer that llama.cpp
    would read with other ids.
    """
    data = bundle.read(TOKENIZER_NAME, MAX_BYTES)
    check_tokenizer(data, str(bundle.folder))
    state: dict[str, Any] = json.loads(data)
    try:
        problem = _problem(state)
        if problem is None:
            return _entries(bundle, state) | _roles(bundle)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise refuse(str(bundle.folder), f"{TOKENIZER_NAME} is not a tokenizer") from None
    raise BundleError(
        f"{bundle.folder}: GGUF cannot hold this tokenizer ({problem}); use the ONNX graphs or the SavedModel"
    )


def _problem(state: dict[str, Any]) -> str | None:
    """Why llama.cpp's "gpt2" with the pattern "gpt-2" would give other ids, in a few words; None if it does not."""
    model, pattern = state["model"], state.get("pre_tokenizer") or {}
    if model.get("type") != "BPE":
        return "it is not a BPE"
    if state.get("normalizer") is not None:
        return "it has a normalizer"
    if pattern.get("type") != "ByteLevel" or pattern.get("use_regex") is False or pattern.get("add_prefix_space"):
        return "its pre-tokenizer is not GPT-2's"
    if (state.get("decoder") or {}).get("type") != "ByteLevel":
        return "its decoder is not ByteLevel"
    if (state.get("post_processor") or {"type": "ByteLevel"}).get("type") != "ByteLevel":
        return "its post-processor may add tokens"
    for key in _OPTIONS:
        if model.get(key):
            return f"its model sets {key}"
    if any(each.get(key) for each in state["added_tokens"] for key in ("single_word", "lstrip", "rstrip")):
        return "an added token matches white space or whole words only"
    if not _byte_letters() <= model["vocab"].keys():
        return "its vocabulary lacks some of the 256 bytes"
    return None


def _byte_letters() -> set[str]:
    """The 256 characters that stand for single bytes in GPT-2's vocabulary (openai/gpt-2, src/encoder.py)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    return {chr(code) for code in (*printable, *range(0x100, 0x200 - len(printable)))}


def _entries(bundle: Bundle, state: dict[str, Any]) -> dict[str, Value]:
    size = bundle.manifest.model.vocab_size
    found = {index: (token, _NORMAL) for token, index in state["model"]["vocab"].items()}
    for added in state["added_tokens"]:
        found[added["id"]] = (added["content"], _CONTROL if added["special"] else _USER_DEFINED)
    if not all(type(index) is int and 0 <= index < size for index in found):
        raise refuse(str(bundle.folder), f"{TOKENIZER_NAME} has ids outside the model's 0 to {size - 1}")
    taken = {token for token, _ in found.values()}
    if len(taken) != len(found):
        raise refuse(str(bundle.folder), f"{TOKENIZER_NAME} has one token under two ids")
    for index in range(size):
        name = f"[PAD{index}]"
        while index not in found and name in taken:
            name = f"[{name}]"
        found.setdefault(index, (name, _UNUSED))
    merges = [each if isinstance(each, str) else " ".join(each) for each in state["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [found[index][0] for index in range(size)],
        "tokenizer.ggml.token_type": [found[index][1] for index in range(size)],
        "tokenizer.ggml.merges": merges,
    }


def _roles(bundle: Bundle) -> dict[str, Value]:
    model = bundle.manifest.model
    roles: dict[str, Value] = {
        "tokenizer.ggml.bos_token_id": model.bos_token_id,
        "tokenizer.ggml.eos_token_id": model.eos_token_id,
        # A prompt begins with its own first token, as everywhere with a bundle.
        "tokenizer.ggml.add_bos_token": False,
    }
    more = [end for end in end_ids(bundle) if end != model.eos_token_id]
    if more:
        roles["tokenizer.ggml.eot_token_id"] = more[0]
    template = chat_template_source(bundle)
    if template is not None:
        roles["tokenizer.chat_template"] = template
    return roles
