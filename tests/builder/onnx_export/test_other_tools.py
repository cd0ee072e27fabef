"""A bundle's graphs as other programs meet them: onnx's own checks, a name on every axis, and the docs' example."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from serving.backends.onnx import OnnxBackend
from serving.bundle import open_bundle
from serving.generation import generate
from serving.sampling import SamplingParams
from serving.sampling.detokenizer import load_tokenizer

DOCS = Path(__file__).parents[3] / "docs" / "onnx.md"
GRAPHS = ("onnx/portable", "ort/fp32", "ort/int8", "ort/int4", "ort/choose")


@pytest.mark.parametrize("name", GRAPHS)
def test_checker_and_strict_shape_inference_are_clean_and_every_axis_is_named(built, name):
    bundle = open_bundle(built.bundle)
    path = bundle.path(bundle.graph(name).path)
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    assert list(inferred.graph.output) == list(model.graph.output)
    for value in [*model.graph.input, *model.graph.output]:
        axes = value.type.tensor_type.shape.dim
        assert axes and all(axis.dim_param or axis.dim_value > 0 for axis in axes), value.name
        # How many to look among is one number for all rows.
        assert axes[0].dim_param == "batch_size" or value.name == "candidates", value.name


@pytest.mark.parametrize("graph", ["ort/fp32", "ort/int8", "ort/int4"])
def test_the_example_of_the_docs_says_what_generate_says(built, tmp_path, graph):
    bundle = open_bundle(built.bundle)
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    script = tmp_path / "continue.py"
    script.write_text(code, encoding="utf-8")
    command = [sys.executable, str(script), str(bundle.folder / graph), "Return the", "9"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout

    tokenizer = load_tokenizer(bundle)
    prompt = tokenizer.encode("Return the").ids
    (ours,) = generate(OnnxBackend(bundle, graph), [prompt], SamplingParams(max_new_tokens=9), -1)  # No end token.
    assert printed == tokenizer.decode(list(ours.token_ids)) + "\n"
