"""A trace knows its weights by their shapes alone: it takes no memory of their size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own, as what TensorFlow holds once it may hold for good. 58 million parameters.
_SCRIPT = """
import resource
from builder.model.pretrained import load_model
from builder.model.gpt2 import GPT2
from builder.onnx_export.kernels import OptimizedKernels
from builder.onnx_export.trace import trace
from serving.bundle.manifest import Geometry

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def run(width, vocab_size):
    geometry = Geometry(vocab_size, 64, width, 4, 8, 4 * width, 1e-5, "gelu_new", 0, 0)
    model = GPT2.create(geometry)
    before = resident()
    trace(model, OptimizedKernels, ["batch_size", 1, vocab_size], "max_sequence_length", "max_sequence_length")
    return resident() - before, 4 * geometry.parameters

run(64, 100)
print(*run(1024, 8000))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_a_trace_takes_no_memory_of_the_weights_size() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True)
    grown, weights = (int(number) for number in done.stdout.split())
    assert weights > 200 << 20
    assert grown < weights / 4, (grown, weights)
