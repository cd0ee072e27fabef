"""OpenVINO's ovmsclient, which speaks TensorFlow Serving's protocols, asks a server unchanged."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from serving.backends.onnx import OnnxBackend
from serving.bundle import open_bundle
from serving.generation import generate
from serving.protocols.tf_serving.signatures import SIGNATURES
from serving.sampling import SamplingParams
from tests.serving.commands.test_serve import process


@pytest.mark.ecosystem
def test_ovmsclient_gets_the_tokens_of_generate_by_rest_and_grpc(real_bundle: Path) -> None:
    python = os.environ.get("OVMS_PYTHON")
    if not python:
        pytest.skip("OVMS_PYTHON names no Python with ovmsclient; run 'make test-ecosystem'")
    with process(real_bundle, "--grpc-port", "0", "--no-access-log") as (server, url):
        assert server.stderr is not None
        port = next(found[1] for line in server.stderr if (found := re.search(r"gRPC at .* port (\d+)", line)))
        script = Path(__file__).with_name("ovms_client.py")
        command = [Path(python).absolute(), script, url, f"localhost:{port}", "bytes"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    backend = OnnxBackend(open_bundle(real_bundle), "ort/fp32")
    expected = generate(backend, [[1, 2, 3], [4, 5]], SamplingParams(max_new_tokens=6), 256)
    wanted = ["AVAILABLE", sorted(SIGNATURES["serving_default"].inputs), [list(each.token_ids) for each in expected]]
    assert json.loads(done.stdout.splitlines()[-1]) == [wanted, wanted]
