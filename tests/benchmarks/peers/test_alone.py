"""`python -m benchmarks.peers --rehearse`: the GPU's runtimes on the CPU, one after the other, within a budget."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.common import hardware, static_batch
from benchmarks.peers import comparison
from benchmarks.peers.__main__ import main
from benchmarks.peers.portable_bundle import main as weights
from benchmarks.peers.runtimes import GPU
from benchmarks.suite import static_batches
from benchmarks.suite.figures.roofline import bound_seconds, step_bytes
from serving.backends.loader import load_backend
from serving.bundle import open_bundle
from serving.errors import BundleError, GPT2BundleError, InputError
from tests.closed_form import geometry

GRAPHS = ("ort/fp32", "onnx/portable")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small probes, no pauses, and no server."""
    monkeypatch.setattr(hardware, "_BYTES", 1 << 20)
    monkeypatch.setattr(hardware, "_SIDE", 64)
    monkeypatch.setattr(static_batches, "_PAUSE", 0)
    monkeypatch.setenv("TENSORFLOW_MODEL_SERVER", "/nowhere/tensorflow_model_server")


def measure(bundle: Path, output: Path, *names: str, more: tuple[str, ...] = ()) -> dict:
    arguments = [str(bundle), "--output", str(output), "--rehearse", "--work", str(output.parent), "--repeats", "1"]
    arguments += ["--prompt-tokens", "16", "--new-tokens", "8", "--batch-size", "1", "--batch-size", "3", "--resume"]
    arguments += [part for name in names for part in ("--runtime", name)]
    result = CliRunner().invoke(main, [*arguments, *more], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(output.read_text())


def rows_of(record):
    return {(row["target"], point["settings"]["requests"]): row for point in record["points"] for row in point["rows"]}


def test_runtimes_are_kept_continued_and_a_missing_one_is_said(built, tmp_path):
    output = tmp_path / "record.json"
    with pytest.raises(GPT2BundleError, match="nothing was measured on cpu"):
        measure(built.bundle, output, "onnx/portable", more=("--seconds", "0"))
    output.unlink()
    record = measure(built.bundle, output, "onnx/portable", "ort-fp32-multi-step8-graphs", "tf-serving")
    rows = rows_of(record)
    assert "TENSORFLOW_MODEL_SERVER" in rows["tf-serving/fp32", 1]["errors"][0]
    for name in ("onnx/portable", "ort-fp32-multi-step8-graphs"):
        for size in (1, 3):
            row = rows[name, size]
            (step,), (rate,) = row["figures"]["step_ms"], row["figures"]["step_tokens_per_second"]
            assert rate == pytest.approx(1e3 * size / step) and row["bound_inter_token_ms"] > 0
            assert row["errors"] == [] and not any(row["differing_requests"].values())
            assert "peak_gpu_memory_bytes" not in row["figures"]
    again = rows_of(measure(built.bundle, output, "onnx/portable"))
    assert again == rows


def test_speculation_is_compared_at_batch_one(built, tmp_path):
    output = tmp_path / "record.json"
    command = [str(built.bundle), "--speculation", "--environments", str(tmp_path), "--work", str(tmp_path), "--output"]
    command += [str(output), "--repeats", "1", "--prompt-tokens", "16", "--new-tokens", "8", "--precision", "fp32"]
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    record = json.loads(output.read_text())
    (point,) = record["points"]
    plain, speculative = point["rows"]
    assert [point["point"], plain["target"], speculative["target"]] == [
        "fp32, batch 1", "ort/fp32", "ort-speculative/fp32"
    ]  # fmt: skip
    assert speculative["errors"] == [] and speculative["outputs_sha256"] == plain["outputs_sha256"]
    assert speculative["bound_inter_token_ms"] is None and plain["bound_inter_token_ms"] > 0
    assert set(record["not_measured"]) == {"openvino/fp32", "llama/fp32", "openvino-lookup/fp32", "llama-lookup/fp32"}
    for more in (["--batch-size", "4"], ["--rehearse"]):
        with pytest.raises(InputError, match="leave the other options out"):
            CliRunner().invoke(main, [*command, *more], catch_exceptions=False)


def test_a_whole_call_is_shared_among_the_tokens_that_it_adds(monkeypatch):
    class Slow:
        def generate(self, prompts, *, max_new_tokens):
            now[0] += 1.0 + 0.25 * max_new_tokens
            return [[7] * max_new_tokens, [8] * min(2, max_new_tokens)]

    now = [0.0]
    monkeypatch.setattr(static_batch.time, "perf_counter", lambda: now[0])
    found = static_batch.GenerateRunner(Slow(), ["a note"]).run([[1], [2]], 4)
    assert (found.prefill, found.steps) == (1.25, [0.25] * 4)
    assert found.tokens == [[7, 8], [7, 8], [7, -1], [7, -1], [7, -1]]


@pytest.mark.slow
def test_tensorflow_and_the_emulator_of_its_server_take_part(built, tmp_path, monkeypatch):
    server = tmp_path / "server"
    server.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.benchmarks.suite.model_server_emulator "$@"\n')
    server.chmod(0o755)
    monkeypatch.setenv("TENSORFLOW_MODEL_SERVER", str(server))
    record = measure(built.bundle, tmp_path / "record.json", "savedmodel", "tf-serving")
    rows = rows_of(record)
    assert len(rows) == 4 and all(row["figures"]["prefill_ms"][0] > 0 for row in rows.values())
    assert rows["tf-serving/fp32", 3]["emulator"] and not any(rows["tf-serving/fp32", 3]["differing_requests"].values())


@pytest.mark.oracle
def test_torch_takes_part_eager_and_compiled(built, tmp_path):
    record = measure(built.bundle, tmp_path / "r.json", "onnx/portable", "torch/fp32", "torch-compiled")
    assert all(row["errors"] == [] for row in rows_of(record).values())


def test_what_the_command_line_gets_wrong_is_a_line_and_code_2(built, tmp_path):
    output = tmp_path / "record.json"
    output.write_text("{")
    command = [sys.executable, "-m", "benchmarks.peers", str(built.bundle), "--prompt-tokens", "4", "--new-tokens", "2"]
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "not a record" in done.stderr


def test_no_runtime_takes_the_time_of_all(built, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "_SHARE", 1e-9)
    with pytest.raises(GPT2BundleError, match="nothing was measured"):
        measure(
            built.bundle, tmp_path / "r.json", "onnx/portable", "ort-fp32-multi-step8-graphs", more=("--seconds", "60")
        )
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["points"] == [] and len(record["not_measured"]) == 4


def test_a_record_of_something_else_and_an_unknown_runtime_are_refused(built, tmp_path):
    output = tmp_path / "record.json"
    measure(built.bundle, output, "onnx/portable")
    with pytest.raises(InputError, match="of another bundle or other lengths"):
        measure(built.bundle, output, more=("--new-tokens", "7"))
    with pytest.raises(InputError, match="no such runtime; there are"):
        measure(built.bundle, output, "nobody")
    with pytest.raises(InputError, match="do not fit a context of 48"):
        measure(built.bundle, output, more=("--prompt-tokens", "48"))


def test_the_bound_is_the_longer_of_reading_and_arithmetic():
    model = geometry()
    width, layers = model.n_embd, model.n_layer
    matrices = model.parameters - model.n_positions * width
    cache = 2 * layers * 4 * 10 * width
    assert step_bytes(model, "fp16", 4, 10) == 2 * matrices + 2 * cache
    # 32-bit weights with a 16-bit KV cache, as in multi-step decode on CUDA.
    assert step_bytes(model, "fp32", 4, 10, "fp16") == 4 * matrices + 2 * cache
    assert all(each.cache == "fp16" for each in GPU if "multi-step" in each.name)
    assert bound_seconds(1e9, 1e6, "fp16", 1e9, {"fp16": 1e30}) == 1e-3
    assert bound_seconds(1e9, 1e6, "fp16", 1e9, {"fp16": 1e9}) == 1.0
    assert bound_seconds(1e9, 1e6, "int8", 1e9, 1e3) == 1e-3, "the rate of float32 products bounds no other precision"


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
    found = [load_backend(open_bundle(small), "onnx", name).prefill([[1, 2, 3]], 8)[1] for name in GRAPHS]
    assert np.isfinite(found[0]).all() and found[0].std() > 0
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
