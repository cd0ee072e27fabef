"""KerasHub's GPT2CausalLM opens a bundle's folder as a preset, and cuts and continues text as the bundle does."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from serving.backends.onnx import OnnxBackend
from serving.bundle import open_bundle
from serving.sampling.detokenizer import load_tokenizer

NEW_TOKENS = 12
PROMPTS = [[5], [70, 71, 72], list(range(10, 30))]
TEXT = "def module(self):\n    return 1"


@pytest.mark.ecosystem
def test_keras_hub_gives_our_tokens(built):
    python = os.environ.get("KERAS_HUB_PYTHON")
    if not python:
        pytest.skip("KERAS_HUB_PYTHON names no Python with keras-hub; run 'make test-ecosystem'")
    bundle = open_bundle(built.bundle)
    script = Path(__file__).with_name("keras_hub_generate.py")
    command = [python, str(script), str(bundle.folder), TEXT, json.dumps(PROMPTS), str(NEW_TOKENS)]
    answer = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    assert answer["tokens"] == load_tokenizer(bundle).encode(TEXT).ids
    assert answer["continued"] == [greedy(OnnxBackend(bundle, "onnx/portable"), prompt) for prompt in PROMPTS]


def greedy(backend, prompt):
    state, logits = backend.prefill([prompt], len(prompt) + NEW_TOKENS)
    tokens = [logits.argmax(-1)]
    while len(tokens) < NEW_TOKENS:
        tokens.append(backend.decode(state, tokens[-1]).argmax(-1))
    return [int(token[0]) for token in tokens]
