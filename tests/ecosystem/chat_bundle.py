"""A bundle of random weights with a long context and a chat template, for clients that send long prompts."""

from __future__ import annotations

import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from serving.bundle import Provenance, write_manifest
from tests.closed_form import byte_tokenizer, chat_files, geometry
from tests.oracles.tiny_bundle import graphs, trace_optimized, trace_portable

CONTEXT = 8192
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_SEED, _SCALE = 5, 0.6


def write_chat_bundle(folder: Path) -> None:
    """Write the bundle `chat` to `folder`: ONNX graphs, a byte tokenizer and `TEMPLATE`."""
    from builder.model.gpt2 import GPT2
    from builder.model.safetensors_file import write_safetensors
    from builder.onnx_export.external_data import write_graph
    from builder.onnx_export.sampling_graph import write_sampling_graph

    model: Any = GPT2.create(replace(geometry(n_positions=CONTEXT), n_embd=32, n_inner=128))
    random = np.random.default_rng(_SEED)
    characters = byte_tokenizer().encode(string.ascii_letters + string.digits + string.punctuation + " ").ids
    printable = np.isin(np.arange(model.geometry.vocab_size), characters)
    # Large random weights and token embeddings of one length (printable ones): greedy tokens vary.
    for variable in model.weights:
        if len(variable.shape) == 2:
            values = random.normal(0, _SCALE, variable.shape)
            if variable.shape[0] == model.geometry.vocab_size:
                values *= np.where(printable, 1.0, 0.5)[:, None] / np.linalg.norm(values, axis=1, keepdims=True)
            variable.assign(values)
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str(), encoding="utf-8")
    for name, data in chat_files(TEMPLATE).items():
        (folder / name).write_bytes(data)
    write_safetensors(model, folder / "model.safetensors")
    write_graph(trace_portable(model), folder / "model.safetensors", folder / "onnx/model.onnx")
    write_graph(trace_optimized(model), folder / "model.safetensors", folder / "ort/fp32/model.onnx")
    write_sampling_graph(model.geometry.vocab_size, folder / "ort/choose/model.onnx")
    write_manifest(
        folder,
        name="chat",
        model=model.geometry,
        graphs={name: graph for name, graph in graphs(model.geometry).items() if graph.runtime == "onnx"},
        provenance=Provenance(recipe={}, corpus_sha256="0" * 64, versions={}, seed=0),
        quality={},
        parity={},
        created="2025-01-31T12:00:00Z",
    )
