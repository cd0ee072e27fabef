"""`python -m benchmarks.gpu`, rehearsed on the processor: the record, going on with it, what is missing, the budget."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import hardware
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.device import floor_ms
from benchmarks.gpu.weights import main as weights
from serving.backends.loader import load_backend
from serving.bundle import open_bundle
from serving.errors import BundleError, InputError
from tests.closed_form import geometry


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small probes, and no server."""
    monkeypatch.setattr(hardware, "_BYTES", 1 << 20)
    monkeypatch.setattr(hardware, "_SIDE", 64)
    monkeypatch.setenv("TENSORFLOW_MODEL_SERVER", "/nowhere/tensorflow_model_server")


def hold(bundle: Path, output: Path, *options: str) -> dict:
    arguments = [str(bundle), "--output", str(output), "--device", "cpu", "--quick", "--batch-sizes", "1,3", *options]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(output.read_text())


def test_contests_are_kept_gone_on_with_and_a_missing_runtime_is_said(built, tmp_path):
    output = tmp_path / "record.json"
    record = hold(built.bundle, output, "--contestants", "ort-fp32-step", "--seconds", "0")
    assert record["contests"] == []
    assert [each["batch_size"] for each in record["skipped"]] == [1, 3]

    record = hold(built.bundle, output, "--contestants", "ort-fp32-step,tf-serving")
    assert record["skipped"] == []
    missing, *_ = (each for each in record["contests"] if each["contestant"] == "tf-serving")
    assert "TENSORFLOW_MODEL_SERVER" in missing["error"]
    ours = [each for each in record["contests"] if each["contestant"] == "ort-fp32-step"]
    assert [each["batch_size"] for each in ours] == [1, 3]
    for each in ours:
        assert each["decode_tokens_per_second"] == pytest.approx(1e3 * each["batch_size"] / each["decode_ms"]["median"])
        assert each["floor_ms"] > 0 and each["gpu_memory_bytes"] == {"before": None, "peak": None}
        assert each["tokens_steady"] and each["tokens_as_first"] and each["versions"]["onnxruntime"]

    again = hold(built.bundle, output, "--contestants", "ort-fp32-step")
    assert [each for each in again["contests"] if each["contestant"] == "ort-fp32-step"] == ours
    assert len(again["sessions"]) == 3


def test_a_record_of_something_else_and_an_unknown_contestant_are_refused(built, tmp_path):
    output = tmp_path / "record.json"
    output.write_text(json.dumps({"bundle": "other", "contests": [], "skipped": []}))
    with pytest.raises(InputError, match="is of another bundle and model and setting"):
        hold(built.bundle, output)
    with pytest.raises(InputError, match="no contestant 'nobody'"):
        hold(built.bundle, output, "--contestants", "nobody")
    with pytest.raises(InputError, match="1 to 4096"):
        hold(built.bundle, output, "--batch-sizes", "0")


def test_the_floor_is_the_longer_of_reading_and_arithmetic():
    model = geometry()
    width, layers = model.n_embd, model.n_layer
    matrices = 12 * layers * width**2 + model.vocab_size * width
    rates = {"read_bytes_per_second": 1e9, "fp16_flops_per_second": 1e30}
    found = floor_ms(model, "fp16", 4, 10, rates)
    assert found["step_bytes"] == 2 * matrices + 2 * 2 * layers * 4 * 10 * width
    assert found["floor_ms"] == pytest.approx(found["step_bytes"] / 1e6)
    found = floor_ms(model, "fp16", 4, 10, rates | {"fp16_flops_per_second": 1e3})
    assert found["floor_ms"] == pytest.approx(found["step_flops"])
    assert floor_ms(model, "fp16", 4, 10, None)["floor_ms"] is None


def test_a_stripped_bundle_is_filled_with_the_weights_that_its_manifest_names(tmp_path, built):
    small, result = (
        tmp_path / "small",
        CliRunner().invoke(weights, ["strip", str(built.bundle), str(tmp_path / "small")]),
    )
    assert result.exit_code == 0, result.output
    assert not (small / "model.safetensors").exists()
    with pytest.raises(BundleError):
        open_bundle(small)
    result = CliRunner().invoke(weights, ["fill", str(small)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert open_bundle(small).manifest.graphs["ort/fp32"].precision == "fp32"
    _, logits = load_backend(open_bundle(small), "onnx").prefill([[1, 2, 3]], 8)
    assert np.isfinite(logits).all() and logits.std() > 0
