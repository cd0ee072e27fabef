"""ONNX Runtime GenAI opens the folders under `ort/` as they lie in a bundle, and says what this project says."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from serving.backends.onnx import OnnxBackend
from serving.bundle import open_bundle
from serving.generation import generate
from serving.sampling import SamplingParams
from serving.sampling.detokenizer import load_tokenizer

NEW_TOKENS = 12
PROMPTS = [[5], [70, 71, 72], list(range(40, 60))]


@pytest.mark.ecosystem
@pytest.mark.parametrize("graph", ["ort/fp32", "ort/int8", "ort/int4"])
def test_genai_gives_the_same_tokens(built, graph):
    python = os.environ.get("GENAI_PYTHON")
    if not python:
        pytest.skip("GENAI_PYTHON names no Python with onnxruntime-genai; run 'make test-ecosystem'")
    bundle = open_bundle(built.bundle)
    script = Path(__file__).with_name("genai_greedy.py")
    folder = bundle.path(f"{graph}/genai_config.json").parent
    command = [python, str(script), str(folder), json.dumps(PROMPTS), str(NEW_TOKENS)]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])

    end = bundle.manifest.model.eos_token_id
    ours = generate(OnnxBackend(bundle, graph), PROMPTS, SamplingParams(max_new_tokens=NEW_TOKENS), end)
    assert answer["answers"] == [list(one.token_ids) for one in ours]
    assert answer["tokens"] == load_tokenizer(bundle).encode(answer["text"]).ids
