"""An emulator of Triton's ONNX Runtime backend, for a Triton that lacks it: `model.py` of a Python-based backend.

Triton itself reads the repository, checks requests and answers; this runs the graph, by ONNX Runtime's Python package.
"""

import os
import sys
from pathlib import Path

# Triton's interpreter does not read the variable itself.
sys.path += os.environ["PYTHONPATH"].split(os.pathsep)

import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    """One model of the repository."""

    @staticmethod
    def auto_complete_config(config):
        """Leave the configuration as it was written."""
        return config

    def initialize(self, args):
        """Open the graph of the version that Triton loads."""
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        """Answer each request by one call."""
        answers = []
        for request in requests:
            feeds = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            names = list(request.requested_output_names())
            found = self.session.run(names, feeds)
            tensors = [triton.Tensor(name, value) for name, value in zip(names, found, strict=True)]
            answers.append(triton.InferenceResponse(output_tensors=tensors))
        return answers
