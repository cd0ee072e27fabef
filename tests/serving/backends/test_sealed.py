"""What was hashed is what is served: files that change under a loaded model change nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

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


def test_weights_that_are_overwritten_or_cut_change_nothing(real_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(real_bundle, folder)
    result = subprocess.run([sys.executable, "-c", _PROGRAM, str(folder)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
