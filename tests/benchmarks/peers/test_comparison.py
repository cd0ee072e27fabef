"""Contests beside other runtimes: the protocol, the turns, what the record says. The peers themselves are not run."""

from __future__ import annotations

import ast
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from benchmarks.peers.child import ROOT, Child
from benchmarks.peers.contest import OWN, PEERS, Contest, Setting, commands, prefill_flops
from benchmarks.peers.protocol import Job, Run, converted
from benchmarks.peers.report import conditions, table

from benchmarks.common import hardware
from benchmarks.peers import contest as contests
from benchmarks.peers.__main__ import add
from serving.bundle import open_bundle
from serving.errors import GPT2BundleError
from tests.closed_form import geometry

FAKE = [sys.executable, "-m", "tests.benchmarks.peers.fake_peer"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small probes and no pauses: these tests look at what is done with the figures."""
    monkeypatch.setattr(hardware, "_BYTES", 1 << 20)
    monkeypatch.setattr(hardware, "_SIDE", 64)
    monkeypatch.setattr(contests, "_PAUSE", 0)


def hold(bundle: Path, work: Path, precision: str = "int8", **contestants: list[str]):
    own = {OWN: [sys.executable, "-m", "benchmarks.peers.bundle_peer"]}
    contest = Contest(open_bundle(bundle), own | contestants, work, lambda line: None)
    return contest.hold(Setting(precision, 3, 5, 4, 2))


def test_a_contest_runs_ours_and_a_peer_and_tells_what_each_did(built, tmp_path):
    record = hold(built.bundle, tmp_path, fake=FAKE)
    ours, fake = record["rows"]
    assert (ours["contestant"], fake["contestant"]) == (OWN, "fake")
    assert np.shape(ours["tokens"]) == (5, 3)
    assert len(ours["tokens_sha256"]) == 1
    assert ours["versions"]["onnxruntime"]
    assert fake["notes"] == ["made up"] and fake["versions"]["numpy"] == np.__version__
    assert (fake["prefill_ms"]["median"], fake["prefill_ms"]["samples"]) == (500, 2)
    assert (fake["decode_ms"]["median"], fake["decode_ms"]["samples"]) == (250, 2 * 4)
    assert fake["decode_tokens_per_second"] == pytest.approx(3 / 0.25)
    assert fake["floor_over_decode"] == pytest.approx(fake["floor_ms"] / 250)
    assert (tmp_path / "fake" / "model").read_text() == "weights"
    told = table({"contests": [record]})
    assert "0 of 3 rows the same" in told and f"`{ours['tokens_sha256'][0][:8]}`" in told
    assert "prefill ahead, decode ahead" in conditions({"contests": [record]})
    json.dumps(record, allow_nan=False)


def test_a_peer_that_fails_is_named_and_left_out(built, tmp_path):
    record = hold(built.bundle, tmp_path, "int4", fake=FAKE)
    assert [row["contestant"] for row in record["rows"]] == [OWN]
    assert record["failed"] == {"fake": "fake: ValueError: no int4 here"}
    assert "fake failed (fake: ValueError: no int4 here)" in conditions({"contests": [record]})


def test_ours_may_not_fail(built, tmp_path):
    with pytest.raises(GPT2BundleError, match="no graph 'ort/fp17'"):
        hold(built.bundle, tmp_path, "fp17")


def test_what_a_contestant_has_started_ends_with_it(tmp_path):
    started = tmp_path / "started"
    with Child("shell", ["sh", "-c", f"sleep 600 & echo $! > {started}; cat"], tmp_path / "log", 1):
        while not (started.exists() and started.read_text().strip()):
            time.sleep(0.01)
    state = Path(f"/proc/{started.read_text().strip()}/stat")
    for _ in range(500):
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.01)
    pytest.fail("the process that the contestant started still runs")


def test_a_process_that_ends_says_where_its_last_words_are(tmp_path):
    with Child("fake", FAKE, tmp_path / "log", 1) as child:
        child.load(Job("b", "fp32", str(tmp_path), 1, 1, 99))
        assert child.run([[7], [9]], 1) == Run(0.5, [0.25], [[7, 10], [8, 11]])
        with pytest.raises(GPT2BundleError, match="fake ended with 3; its last words are in"):
            child.run([[7]], 13)
    assert (tmp_path / "log").read_text() == "a library's chatter\nmore of it\nmore of it\n"


def test_only_installed_peers_of_the_precision_take_part(tmp_path):
    for name in ("torch", "llama"):
        (tmp_path / f".venv-peer-{name}").mkdir()
        (tmp_path / f".venv-peer-{name}" / "installed").touch()
    (tmp_path / ".venv-peer-openvino" / "bin").mkdir(parents=True)
    assert list(commands("fp32", tmp_path)) == [OWN, "torch", "llama"]
    assert list(commands("int4", tmp_path)) == [OWN, "llama"]


def test_every_peer_has_a_module_that_imports_nothing_of_ours_but_the_protocol_and_exact_versions():
    folder = ROOT / "benchmarks" / "peers"
    for name in PEERS:
        tree = ast.parse((folder / f"{name}_peer.py").read_text(encoding="utf-8"))
        froms = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        own = {
            module for module in froms if module and module.partition(".")[0] in ("benchmarks", "serving", "builder")
        }
        assert own == {"benchmarks.peers.protocol"}
        lines = (folder / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        assert lines and all("==" in line or line.startswith("#") for line in lines)


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


def test_a_contest_takes_the_place_of_an_older_one_of_its_kind():
    record = {"contests": []}
    for precision, size, mark in [("int8", 4, 1), ("fp32", 16, 2), ("fp32", 4, 3), ("int8", 4, 4)]:
        add(record, {"precision": precision, "batch_size": size, "mark": mark})
    assert [contest["mark"] for contest in record["contests"]] == [3, 2, 4]


def test_prefill_flops_are_those_of_the_matrices():
    sizes = geometry()
    block = 4 * sizes.n_embd**2 + 2 * sizes.n_embd * sizes.n_inner
    head = sizes.n_embd * sizes.vocab_size
    attention = 2 * sizes.n_embd  # One token looks at one: a product with the keys, one with the values.
    assert prefill_flops(sizes, 3, 1) == 3 * 2 * (sizes.n_layer * (block + attention) + head)


def test_the_compute_probe_keeps_its_samples():
    probe = hardware.ComputeProbe()
    assert probe.samples == [probe.sample(passes=1)]
    assert probe.samples[0] > 0
