"""Triton loads the repository of `deploy --target triton`, and a client that passes the KV cache back gets our tokens.

A `tritonserver` on PATH runs with its own backends. Without one, the binary of nvidia-pytriton runs, which has no ONNX
Runtime backend: a Python-based one emulates it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient import http
from tritonclient.utils import InferenceServerException

from serving.bundle import Bundle
from serving.cli import run
from serving.sampling.detokenizer import load_tokenizer
from tests.ecosystem.conftest import NEW_TOKENS, TEXTS, Answers, python_of

pytestmark = pytest.mark.ecosystem
START = 60
"""Seconds."""


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, str]]:
    """How Triton is started, and its environment."""
    if (found := shutil.which("tritonserver")) is not None:
        return [found], {}
    python = python_of("triton")
    (packages,) = python.parents[1].glob("lib/python3.*/site-packages")
    triton, backends = packages / "pytriton/tritonserver", tmp_path_factory.mktemp("backends")
    shutil.copytree(triton / "backends/python", backends / "python")
    stubs = triton / "python_backend_stubs" / f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(stubs / "triton_python_backend_stub", backends / "python")
    (backends / "onnxruntime").mkdir()
    shutil.copy(Path(__file__).with_name("triton_onnx_backend.py"), backends / "onnxruntime/model.py")
    paths = {"LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"), "PYTHONPATH": str(packages)}
    return [str(triton / "bin/tritonserver"), f"--backend-directory={backends}"], paths


@pytest.fixture(scope="module")
def repository(varied: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deployed") / "here"
    assert run(["deploy", str(varied.folder), "--target", "triton", "--output", str(folder)]) == 0
    return folder / "models"


@contextlib.contextmanager
def serving(command: tuple[list[str], dict[str, str]], repository: Path, log: Path, *models: str) -> Iterator[str]:
    """The address of a Triton that serves `models`; the test fails with its log if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words, paths = command
    words = [*words, f"--model-repository={repository}", "--http-address=127.0.0.1", f"--http-port={port}"]
    words += ["--allow-grpc=false", "--allow-metrics=false", "--model-control-mode=explicit", "--strict-readiness=true"]
    words += [f"--load-model={model}" for model in models]
    with log.open("w") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=os.environ | paths)
    try:
        client, deadline = http.InferenceServerClient(f"127.0.0.1:{port}"), time.monotonic() + START
        while not ready(client):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def ready(client: http.InferenceServerClient) -> bool:
    try:
        return bool(client.is_server_ready())
    except (OSError, InferenceServerException):
        return False


def test_the_onnx_model_gives_our_tokens(
    command: Any, repository: Path, varied: Bundle, expected: Answers, tmp_path: Path
) -> None:
    model = f"{varied.manifest.name}_onnx"
    with serving(command, repository, tmp_path / "log", model) as url:
        client = http.InferenceServerClient(url)
        assert client.is_model_ready(model)
        tokenizer = load_tokenizer(varied)
        assert [greedy(client, varied, tokenizer.encode(text).ids) for text in TEXTS] == expected.answers
        tensor = http.InferInput("input_ids", [1, 1], "INT32")
        tensor.set_data_from_numpy(np.zeros((1, 1), np.int32))
        with pytest.raises(InferenceServerException, match="input"):
            client.infer(model, [tensor])


def greedy(client: http.InferenceServerClient, bundle: Bundle, prompt: list[int]) -> list[int]:
    """The tokens after `prompt`; each call sends the KV cache that the last one gave."""
    graph, model = bundle.graph("onnx/portable"), bundle.manifest.model
    names = [name for name in graph.inputs if name.startswith("past_key_values")]
    cache = {name: np.zeros((1, model.n_head, 0, model.head_dim), np.float32) for name in names}
    ids, length, made = prompt, 0, list[int]()
    while len(made) < NEW_TOKENS:
        positions = np.arange(length, length + len(ids))[None]
        length += len(ids)
        feeds = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, length), np.int64), **cache}
        inputs = []
        for name, value in (feeds | {"position_ids": positions}).items():
            kind = "INT64" if value.dtype == np.int64 else "FP32"
            inputs.append(http.InferInput(name, list(value.shape), kind).set_data_from_numpy(value))
        answer = client.infer(
            f"{bundle.manifest.name}_onnx", inputs, outputs=[http.InferRequestedOutput(name) for name in graph.outputs]
        )
        cache = {name: answer.as_numpy(name.replace("past_key_values", "present")) for name in names}
        ids = [int(answer.as_numpy("logits")[0, -1].argmax())]
        made += ids
    return made


def test_the_savedmodels_configuration_lacks_nothing_but_a_backend(
    command: Any, repository: Path, varied: Bundle, tmp_path: Path
) -> None:
    """Triton reads it and then looks for the TensorFlow backend, which not every Triton has."""
    name = varied.manifest.name
    with serving(command, repository, tmp_path / "log", f"{name}_onnx") as url:
        client = http.InferenceServerClient(url)
        try:
            client.load_model(name)
        except InferenceServerException as error:
            assert "backend" in str(error) and "tensorflow" in str(error), str(error)
        else:
            assert client.is_model_ready(name)
