"""Optimum's ORTModelForCausalLM opens the portable graph as it lies in a bundle, and continues as transformers does."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from serving.backends.onnx import OnnxBackend
from serving.bundle import open_bundle

NEW_TOKENS = 12
PROMPTS = [[5], [70, 71, 72], list(range(40, 60))]


@pytest.mark.ecosystem
def test_optimum_gives_the_tokens_of_transformers_on_a_left_padded_batch(built):
    python = os.environ.get("OPTIMUM_PYTHON")
    if not python:
        pytest.skip("OPTIMUM_PYTHON names no Python with optimum-onnx; run 'make test-ecosystem'")
    bundle = open_bundle(built.bundle)
    script = Path(__file__).with_name("optimum_generate.py")
    command = [python, str(script), str(bundle.folder), json.dumps(PROMPTS), str(NEW_TOKENS)]
    answer = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    assert answer["uses_cache"]
    assert answer["optimum"] == answer["transformers"]
    assert answer["optimum"] == greedy(OnnxBackend(bundle, "onnx/portable"), bundle.manifest.model.eos_token_id)


def greedy(backend, end):
    """Our continuations by the same graph, the end token kept out of the choice as by `min_new_tokens`."""
    answers = []
    for prompt in PROMPTS:
        state, logits = backend.prefill([prompt], len(prompt) + NEW_TOKENS)
        tokens = []
        for step in range(NEW_TOKENS):
            logits = logits.copy()
            logits[:, end] = float("-inf")
            tokens.append(int(logits.argmax()))
            if step + 1 < NEW_TOKENS:
                logits = backend.decode(state, logits.argmax(-1))
        answers.append(tokens)
    return answers
