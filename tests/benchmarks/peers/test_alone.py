"""`python -m benchmarks.gpu`, rehearsed on the processor: the record, going on with it, what is missing, the budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from benchmarks.gpu import suite
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.contestants import CONTESTANTS
from benchmarks.gpu.device import MemoryWatch, floor_ms
from benchmarks.gpu.weights import main as weights
from click.testing import CliRunner

from benchmarks.common import hardware
from serving.backends.loader import load_backend
from serving.bundle import open_bundle
from serving.errors import BundleError, GPT2BundleError, InputError
from tests.closed_form import geometry

GRAPHS = ("ort/fp32", "onnx/portable")


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
    record = hold(built.bundle, output, "--contestants", "ort-fp32-portable", "--seconds", "0")
    assert record["contests"] == []
    assert [each["batch_size"] for each in record["skipped"]] == [1, 3]

    record = hold(built.bundle, output, "--contestants", "ort-fp32-portable,ort-fp32-loop8-graphs,tf-serving")
    assert record["skipped"] == []
    missing, *_ = (each for each in record["contests"] if each["contestant"] == "tf-serving")
    assert "TENSORFLOW_MODEL_SERVER" in missing["error"]
    ours = [each for each in record["contests"] if each["contestant"] != "tf-serving"]
    assert [each["batch_size"] for each in ours] == [1, 3, 1, 3]
    for each in ours:
        assert each["decode_tokens_per_second"] == pytest.approx(1e3 * each["batch_size"] / each["decode_ms"]["median"])
        assert each["floor_ms"] > 0 and each["gpu_memory_bytes"] == {"peak": None, "whole_gpu": True}
        assert each["tokens_steady"] and each["tokens_as_first"] and each["versions"]["onnxruntime"]

    again = hold(built.bundle, output, "--contestants", "ort-fp32-portable")
    assert [each for each in again["contests"] if each["contestant"] != "tf-serving"] == ours
    assert len(again["sessions"]) == 3


def rehearse(bundle: Path, output: Path, names: list[str]) -> None:
    """Run contestants and see figures, and equal tokens at equal precision and batch size."""
    record = hold(bundle, output, "--contestants", ",".join(names))
    assert [each.get("error") for each in record["contests"]] == [None] * 2 * len(names)
    for each in record["contests"]:
        assert each["decode_ms"]["median"] >= 0 and each["prefill_ms"]["median"] > 0 and each["tokens_as_first"]


@pytest.mark.slow
def test_tensorflow_and_what_stands_for_its_server_take_part(built, tmp_path, monkeypatch):
    server = tmp_path / "server"
    server.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.benchmarks.suite.model_server_emulator "$@"\n')
    server.chmod(0o755)
    monkeypatch.setenv("TENSORFLOW_MODEL_SERVER", str(server))
    output = tmp_path / "record.json"
    rehearse(built.bundle, output, ["tensorflow", "tf-serving"])
    served = json.loads(output.read_text())["contests"][-1]
    assert served["contestant"] == "tf-serving" and "STAND-IN, not TensorFlow Serving" in served["notes"]


@pytest.mark.oracle
def test_torch_takes_part_eager_and_compiled(built, tmp_path):
    rehearse(built.bundle, tmp_path / "record.json", ["ort-fp32-portable", "torch-fp32", "torch-fp16-compiled"])


def test_what_the_command_line_gets_wrong_is_a_line_and_code_2(built, tmp_path):
    output = tmp_path / "record.json"
    output.write_text("{")
    command = [sys.executable, "-m", "benchmarks.gpu", str(built.bundle), "--quick", "--device", "cpu"]
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot be read as a record" in done.stderr


def test_where_nothing_could_be_measured_the_code_says_so(built, tmp_path):
    with pytest.raises(GPT2BundleError, match="nothing was measured on cpu"):
        hold(built.bundle, tmp_path / "record.json", "--contestants", "tf-serving")


def test_no_contestant_takes_the_time_of_all(built, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "_SHARE", 0.0)
    record = hold(built.bundle, tmp_path / "record.json", "--contestants", "ort-fp32-portable,ort-fp32-loop8-graphs")
    assert record["contests"] == [] and len(record["skipped"]) == 4


def test_memory_is_the_processs_own_where_it_is_told_and_else_the_gpus(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\ncase $1 in\n"
        f"  --query-compute*) cat {tmp_path}/apps ;;\n  *) cat {tmp_path}/used; echo 7000 > {tmp_path}/used ;;\nesac\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as measured:
        for apps, expected in ((f"{measured.pid}, 300\n{os.getpid()}, 900\n", (300, False)), ("", (2000, True))):
            (tmp_path / "apps").write_text(apps)
            (tmp_path / "used").write_text("5000\n")
            with MemoryWatch("cuda") as watch:
                watch.follow(measured.pid)
                for _ in range(400):
                    if watch.peak is not None:
                        break
                    time.sleep(0.02)
            assert (watch.peak >> 20, watch.whole) == expected
        measured.kill()


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
    matrices = layers * (4 * width**2 + 2 * width * model.n_inner) + model.vocab_size * width
    rates = {"read_bytes_per_second": 1e9, "fp16_flops_per_second": 1e30}
    found = floor_ms(model, "fp16", "fp16", 4, 10, rates)
    assert found["step_bytes"] == 2 * matrices + 2 * 2 * layers * 4 * 10 * width
    assert found["floor_ms"] == pytest.approx(found["step_bytes"] / 1e6)
    found = floor_ms(model, "fp16", "fp16", 4, 10, rates | {"fp16_flops_per_second": 1e3})
    assert found["floor_ms"] == pytest.approx(found["step_flops"])
    assert floor_ms(model, "fp16", "fp16", 4, 10, None)["floor_ms"] is None
    # 32-bit weights with 16-bit caches, as in the loop.
    assert floor_ms(model, "fp32", "fp16", 4, 10, rates)["step_bytes"] == 4 * matrices + 2 * 2 * layers * 4 * 10 * width
    assert all(each.cache == "fp16" for name, each in CONTESTANTS.items() if "-loop" in name)


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
