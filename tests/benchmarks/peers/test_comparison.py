"""Runtimes under test: the protocol, the rounds, what the record says. The peers themselves are not run."""

from __future__ import annotations

import ast
import contextlib
import json
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from benchmarks.common import hardware
from benchmarks.common.held_out_text import cut_prompts
from benchmarks.common.runtime_process import ROOT, RuntimeProcess
from benchmarks.common.static_batch import BatchRun, LoadRequest, converted
from benchmarks.peers.comparison import Comparison, Settings, new_record
from benchmarks.peers.runtimes import CPU, GPU, SPECULATION, Runtime, chosen
from benchmarks.suite import static_batches
from benchmarks.suite.machine.meters import Meters, Reading
from benchmarks.suite.record import SCHEMA, about, read_record, write_reports
from benchmarks.suite.report.markdown import to_markdown, verdict
from serving.bundle import open_bundle
from serving.errors import GPT2BundleError
from tests.closed_form import ClosedFormBackend

FAKE = [sys.executable, "-m", "tests.benchmarks.peers.fake_peer"]


class Fake(Runtime):
    def command(self, device, environments):
        return FAKE


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small probes and no pauses: these tests look at what is done with the figures."""
    monkeypatch.setattr(hardware, "_BYTES", 1 << 20)
    monkeypatch.setattr(hardware, "_SIDE", 64)
    monkeypatch.setattr(static_batches, "_PAUSE", 0)


def compare(
    bundle: Path, work: Path, precision: str, *others: Runtime, sizes=(3,), alone=False, record=None, meters=None
):
    opened, settings = open_bundle(bundle), Settings(5, 4, 2, alone=alone)
    record = new_record(about(opened), settings, SCHEMA) if record is None else record
    rates = {"read_bytes_per_second": 1e9, "fp32_flops_per_second": 1e9}
    Comparison(
        opened, range(7), settings, record, environments=work, work=work, rates=rates if alone else None,
        meters=meters or Meters(), keep=lambda: None, say=lambda line: None,
    ).run([Runtime(f"ort/{precision}", "onnx_peer", precision), *others], sizes)  # fmt: skip
    return record


class Counting(Meters):
    """A machine whose GPU has 3 GiB in use."""

    @contextlib.contextmanager
    def window(self):
        yield types.SimpleNamespace(reading=Reading(peak_gpu_memory_bytes=3 << 30))


def test_gpu_memory_is_a_figure_of_the_row(built, tmp_path):
    record = compare(built.bundle, tmp_path, "fp32", alone=True, meters=Counting())
    (row,) = record["points"][0]["rows"]
    assert row["figures"]["peak_gpu_memory_bytes"] == [3 << 30] * 2
    text = to_markdown(record | {"client_overhead_ms": None})
    assert "GPU memory, MiB" in text and "| 3,072 |" in text


def test_ours_and_a_peer_take_turns_and_the_record_is_one_of_the_suite(built, tmp_path):
    record = compare(built.bundle, tmp_path, "int8", Fake("fake/int8", "fake", "int8", bounded=False))
    (point,) = record["points"]
    ours, fake = point["rows"]
    assert (point["point"], ours["target"], fake["target"]) == ("int8, batch 3", "ort/int8", "fake/int8")
    assert fake["figures"] == {
        "prefill_ms": [500.0] * 2,
        "step_ms": [250.0] * 2,
        "step_tokens_per_second": [12.0] * 2,
    }
    assert fake["bound_inter_token_ms"] is None and ours["bound_inter_token_ms"] > 0
    assert fake["intervals_ms"]["step_ms"] == [250.0, 250.0] and fake["notes"] == ["made up"] and fake["emulator"]
    assert fake["differing_requests"] == {"ort/int8": [0, 1, 2]} and ours["differing_requests"] == {
        "fake/int8": [0, 1, 2]
    }
    assert ours["bound_inter_token_ms"] > 0 and ours["roofline"]["decode"]["rows"] == 3
    assert point["session"]["read_bandwidth_bytes_per_second"] == record["read_bandwidth_bytes_per_second"] > 0
    assert record["targets"][1]["versions"]["numpy"] == np.__version__
    assert (tmp_path / "fake" / "model").read_text() == "weights"
    output = tmp_path / "r.json"
    write_reports(record, output)
    assert read_record(output) == json.loads(json.dumps(record))
    assert "fake/int8 (emulator)" in output.with_suffix(".html").read_text()
    assert "OUTPUTS DIFFER within int8 precision: ort/int8 | fake/int8 (emulator)" in to_markdown(record)
    # Two repeats are too few for a verdict.
    assert "int8, batch 3: decode step, ms: too few repeats: ort/int8" in "\n".join(verdict(record))


def test_a_runtime_that_fails_is_named_and_left_out(built, tmp_path):
    record = compare(
        built.bundle, tmp_path, "int8", Fake("fake/int4", "fake", "int4"), Runtime("none/int8", "no", "int8")
    )
    rows = {row["target"]: row for point in record["points"] for row in point["rows"]}
    assert rows["fake/int4"]["errors"] == ["fake/int4: ValueError: no int4 here"]
    (error,) = rows["none/int8"]["errors"]
    assert "ended with 1; its last words are in none-int8-3.log" in error
    assert rows["ort/int8"]["errors"] == [] and "- fake/int4: fake/int4: ValueError" in to_markdown(record)


def test_one_after_the_other_rows_join_a_point_without_a_winner(built, tmp_path):
    record = compare(built.bundle, tmp_path, "fp32", sizes=(1, 3), alone=True)
    record = compare(
        built.bundle, tmp_path, "fp32", Fake("fake/fp32", "fake", "fp32"), sizes=(3,), alone=True, record=record
    )
    assert [(point["point"], len(point["rows"])) for point in record["points"]] == [("batch 1", 1), ("batch 3", 2)]
    point = record["points"][1]
    assert set(point["winners"].values()) == {None}
    ours, fake = point["rows"]
    assert ours["differing_requests"] == {"fake/fp32": [0, 1, 2]} and fake["bound_inter_token_ms"] > 0
    # At 1 GFLOP/s arithmetic takes longer than reading.
    assert fake["bound_inter_token_ms"] == ours["bound_inter_token_ms"] > 0


def test_what_a_runtime_has_started_ends_with_it(tmp_path):
    started = tmp_path / "started"
    command = ["sh", "-c", f"sleep 600 & echo $! > {started}; cat"]
    with RuntimeProcess("shell", "fp32", command, tmp_path / "log", 1):
        while not (started.exists() and started.read_text().strip()):
            time.sleep(0.01)
    state = Path(f"/proc/{started.read_text().strip()}/stat")
    for _ in range(500):
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.01)
    pytest.fail("the process that the runtime started still runs")


def test_a_process_that_ends_says_where_its_last_words_are(tmp_path):
    with RuntimeProcess("fake", "fp32", FAKE, tmp_path / "log", 1) as process:
        process.load(LoadRequest("b", "fp32", str(tmp_path), 1, 1, 99))
        assert process.run([[7], [9]], 1) == BatchRun(0.5, [0.25], [[7, 10], [8, 11]])
        with pytest.raises(GPT2BundleError, match="fake ended with 3; its last words are in"):
            process.run([[7]], 13)
    assert (tmp_path / "log").read_text() == "a library's chatter\nmore of it\nmore of it\n"


def test_a_runtime_takes_part_if_its_environment_is_there(tmp_path):
    for name in ("torch", "llama"):
        (tmp_path / f".venv-peer-{name}").mkdir()
        (tmp_path / f".venv-peer-{name}" / "installed").touch()
    (tmp_path / ".venv-peer-openvino" / "bin").mkdir(parents=True)
    there = [each.name for each in CPU if each.is_installed(tmp_path)]
    assert [name for name in there if name.endswith("fp32")] == [
        "ort/fp32",
        "savedmodel/fp32",
        "torch/fp32",
        "llama/fp32",
    ]
    assert [each.name for each in chosen(CPU, ["llama", "ort/int8"])] == [
        "ort/int8",
        *(f"llama/{p}" for p in ("fp32", "int8", "int4")),
    ]
    names = [each.name for each in (*CPU, *GPU)]
    assert len({*names}) == len(CPU) + len(GPU) - len({each.name for each in CPU} & {each.name for each in GPU})


def test_every_peer_has_a_module_that_imports_only_the_protocol_and_exact_versions():
    folder = ROOT / "benchmarks" / "peers"
    for name, module in {(each.environment, each.module) for each in (*CPU, *SPECULATION) if each.environment}:
        tree = ast.parse((folder / f"{module}.py").read_text(encoding="utf-8"))
        froms = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        own = {each for each in froms if each and each.partition(".")[0] in ("benchmarks", "serving", "builder")}
        # GGUF files are written with numpy alone.
        conversion = {"serving.bundle", "serving.gguf"} if name == "llama" else set()
        assert own - conversion == {"benchmarks.common.static_batch"}
        lines = (folder / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        assert lines and all("==" in line or line.startswith("#") for line in lines)
    tree = ast.parse((ROOT / "benchmarks" / "common" / "static_batch.py").read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {str(module).partition(".")[0] for module in modules} <= sys.stdlib_module_names


def test_a_conversion_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="half"), converted(tmp_path / "a") as draft:
        (draft / "x").touch()
        raise ValueError("half")
    assert list(tmp_path.iterdir()) == []
    with converted(tmp_path / "a") as draft:
        (draft / "x").touch()
    with converted(tmp_path / "a") as draft:
        assert draft is None
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x"]


def test_prompts_go_round_the_text():
    assert cut_prompts([5, 6, 7], 2, 4) == [[5, 6, 7, 5], [6, 7, 5, 6]]


def test_runners_rotate_and_a_warm_up_is_not_counted():
    from benchmarks.common.static_batch import BackendRunner
    from benchmarks.suite.load.schedule import Planner

    order = []

    class Noted(BackendRunner):
        def run(self, prompts, new_tokens):
            order.append((self.name, new_tokens))
            return super().run(prompts, new_tokens)

    runners = {}
    for name in "ab":
        runners[name] = Noted(ClosedFormBackend())
        runners[name].name = name
    played = static_batches.play_batches(runners, Planner(range(10), 32).steps(2, 4, 9), 3)
    assert order == [("a", 8), ("b", 8), ("a", 9), ("b", 9), ("b", 9), ("a", 9), ("a", 9), ("b", 9)]
    assert [len(runs) for runs in played.values()] == [3, 3]
    assert np.shape(played["a"][0].tokens) == (10, 2) and played["a"][0].tokens == played["b"][0].tokens


def test_the_compute_probe_keeps_its_samples():
    probe = hardware.ComputeProbe()
    assert probe.samples == [probe.sample(passes=1)]
    assert probe.samples[0] > 0
