"""What ONNX Runtime GenAI needs in addition to an optimized graph: its configuration and the tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from builder.special_tokens import read_token_ids
from serving.bundle import Geometry

CONFIG = "genai_config.json"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def genai_config(geometry: Geometry, pad_token_id: int | None = None) -> dict[str, Any]:
    """The configuration of a graph with this project's tensor names and a shared cache buffer.

    Without a padding token the end token pads.
    """
    return {
        "model": {
            # Its type "gpt2" stands for graphs with one past tensor a layer; this one has keys and values apart.
            "type": "decoder",
            "vocab_size": geometry.vocab_size,
            "context_length": geometry.n_positions,
            "bos_token_id": geometry.bos_token_id,
            "eos_token_id": geometry.eos_token_id,
            "pad_token_id": geometry.eos_token_id if pad_token_id is None else pad_token_id,
            "decoder": {
                "session_options": {},
                "filename": "model.onnx",
                "head_size": geometry.padded_head_dim,
                "hidden_size": geometry.n_embd,
                "num_attention_heads": geometry.n_head,
                "num_key_value_heads": geometry.n_head,
                "num_hidden_layers": geometry.n_layer,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"do_sample": False, "max_length": geometry.n_positions, "past_present_share_buffer": True},
    }


def write_genai(geometry: Geometry, bundle: Path, folder: Path) -> None:
    """Write genai_config.json into a graph's `folder`, and copy the tokenizer of `bundle` there."""
    (folder / CONFIG).write_text(
        json.dumps(genai_config(geometry, read_token_ids(bundle).pad), indent=2) + "\n", encoding="utf-8"
    )
    for name in _TOKENIZER:
        shutil.copyfile(bundle / name, folder / name)
