"""Clients of OpenAI's protocol, and lm_eval, ask a server of a small real model unchanged."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from serving.backends.onnx import OnnxBackend
from serving.bundle import open_bundle
from serving.generation import generate
from serving.sampling import SamplingParams
from tests.closed_form import byte_tokenizer
from tests.ecosystem.openai_clients import PROMPT, TOKENS
from tests.serving.commands.test_serve import process

TASK = """
task: own
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list:
  - metric: acc
"""
DOCUMENTS = [
    {"context": "ab cd", "choices": [" ef", " gh i"]},
    {"context": "The end", "choices": [".", "?! and so on"]},
    {"context": "x", "choices": ["é", "y"]},
]


@pytest.fixture(scope="module")
def python() -> Path:
    found = os.environ.get("CLIENTS_PYTHON")
    if not found:
        pytest.skip("CLIENTS_PYTHON names no Python with OpenAI's clients and lm_eval; run 'make test-ecosystem'")
    return Path(found).absolute()


@pytest.fixture(scope="module")
def url(python: Path, real_bundle: Path) -> Iterator[str]:
    with process(real_bundle, "--no-access-log") as (_, url):
        yield url


@pytest.mark.ecosystem
@pytest.mark.parametrize("client", ["openai", "litellm", "langchain"])
def test_a_client_gets_the_text_of_generate_whole_and_streamed(
    python: Path, url: str, real_bundle: Path, client: str
) -> None:
    tokenizer = byte_tokenizer()
    backend = OnnxBackend(open_bundle(real_bundle), "ort/fp32")
    (expected,) = generate(backend, [tokenizer.encode(PROMPT).ids], SamplingParams(max_new_tokens=TOKENS), 256)
    text = tokenizer.decode([token for token in expected.token_ids if token != 256])
    script = Path(__file__).with_name("openai_clients.py")
    done = subprocess.run(
        [python, script, client, url, "bytes"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [text, text, "context_length_exceeded"]


@pytest.mark.ecosystem
def test_lm_eval_needs_no_more_than_the_url(python: Path, url: str, real_bundle: Path, tmp_path: Path) -> None:
    data = tmp_path / "own.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in DOCUMENTS))
    (tmp_path / "own.yaml").write_text(TASK.format(data=data))
    command = [python.with_name("lm_eval"), "run", "--model", "local-completions", "--tasks", "own"]
    command += ["--model_args", f"base_url={url}/v1/completions,max_length=48", "--include_path", tmp_path]
    command += ["--output_path", tmp_path / "out", "--log_samples"]
    home = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=home)
    assert done.returncode == 0 and "Auto-detected remote tokenizer" in done.stderr, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").glob("*/samples_own_*.jsonl")
    found = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda each: each["doc_id"])
    backend = OnnxBackend(open_bundle(real_bundle), "onnx/portable")
    for document, sample in zip(DOCUMENTS, found, strict=True):
        for choice, ((answer,),) in zip(document["choices"], [[each] for each in sample["resps"]], strict=True):
            assert float(answer[0]) == pytest.approx(score(backend, str(document["context"]), choice), abs=1e-3)


def score(backend: OnnxBackend, context: str, choice: str) -> float:
    """The log-probability of `choice` after `context`, by a whole forward pass for each of its tokens."""
    tokenizer, total = byte_tokenizer(), 0.0
    start, ids = len(tokenizer.encode(context).ids), tokenizer.encode(context + choice).ids
    for place in range(start, len(ids)):
        _, logits = backend.prefill([ids[:place]], place)
        line = logits[0].astype(np.float64)
        total += line[ids[place]] - np.log(np.exp(line - line.max()).sum()) - line.max()
    return total
