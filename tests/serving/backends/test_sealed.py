"""What was hashed is what is served: files that change under a loaded model change nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import os, sys
from pathlib import Path
from serving.backends.loader import load_backend
from serving.bundle import open_bundle
from serving.errors import BundleError
from serving.generation import generate
from serving.sampling import SamplingParams

bundle = open_bundle(sys.argv[1])
backend = load_backend(bundle, "onnx")
weights = bundle.path("ort/fp32/model.onnx_data")

def tokens():
    return generate(backend, [[40, 41, 42]], SamplingParams(max_new_tokens=8), 256)

before = tokens()
with weights.open("r+b") as file:
    file.write(os.urandom(weights.stat().st_size))
assert tokens() == before
os.truncate(weights, 0)
assert tokens() == before
try:
    load_backend(bundle, "onnx")
except BundleError as error:
    assert "has changed" in str(error), error
else:
    raise AssertionError("loaded")
"""

_SAVED = """
import os, sys
import numpy as np
from pathlib import Path
from serving.backends.tensorflow import TensorFlowBackend
from serving.bundle import open_bundle
from serving.clients.session_transport import SessionTransport
from serving.errors import BundleError

bundle = open_bundle(sys.argv[1])
backend = TensorFlowBackend(bundle)
session = SessionTransport(bundle)
(weights,) = Path(sys.argv[1], "savedmodel/1/variables").glob("*.data-*")

def logits():
    _, found = backend.prefill([[40, 41, 42]], 4)
    outputs = session.predict("prefill", {"token_ids": [[40, 41, 42]], "lengths": [3], "capacity": [4]}, 60)
    return found, outputs["logits"]

before = logits()
# Of the same size, as what was opened and checked is replaced before it is loaded.
weights.write_bytes(bytes(weights.stat().st_size))
for one, other in zip(before, logits()):
    np.testing.assert_array_equal(one, other)
for kind in (TensorFlowBackend, SessionTransport):
    try:
        kind(bundle)
    except BundleError as error:
        assert "has changed" in str(error) and sys.argv[1] in str(error), error
    else:
        raise AssertionError("loaded")
assert not list(Path(os.environ["TMPDIR"]).glob("gpt2-bundle-*")), "copies stay"
"""


@pytest.mark.slow
def test_a_saved_model_is_what_was_hashed(real_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(real_bundle, folder)
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", _SAVED, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert result.returncode == 0, result.stderr


def test_weights_that_are_overwritten_or_cut_change_nothing(real_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(real_bundle, folder)
    result = subprocess.run([sys.executable, "-c", _PROGRAM, str(folder)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
