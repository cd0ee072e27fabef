"""The command: a scenario from bundle to record, tables and page; compare and gate; and the suite's own check."""

from __future__ import annotations

import asyncio
import json

import pytest

from benchmarks import hardware
from benchmarks.suite.calibrate import client_overhead, fake_server
from benchmarks.suite.clock import WallClock
from benchmarks.suite.measure import measure
from benchmarks.suite.metrics import Objectives
from benchmarks.suite.schedule import Lengths, Planner
from serving.cli import run


@pytest.fixture(autouse=True)
def small_probe(monkeypatch):
    monkeypatch.setattr(hardware, "_BYTES", 1 << 20)


def test_from_a_bundle_to_a_record_and_back(built, tmp_path, capfd, fails):
    output, schedule = tmp_path / "r.json", tmp_path / "s.jsonl"
    command = ["bench", str(built.bundle), "--target", "ort/fp32", "--requests", "3", "--repeats", "2"]
    drawn = ["--scenario", "single", "--scenario", "concurrency", "--clients", "2", "--clients", "3", "--save-schedule"]
    assert run([*command, *drawn, str(schedule), "--output", str(output), "--slo-e2e", "10000"]) == 0
    record = json.loads(output.read_text())
    assert [point["scenario"] for point in record["points"]] == ["single", "concurrency", "concurrency"]
    row = record["points"][0]["rows"][0]
    assert row["summary"]["requests"] == 6 and row["summary"]["failed"] == 0 and not row["repeats_differ"]
    assert row["figures"]["goodput"] == row["figures"]["requests_per_second"]
    assert row["floor_inter_token_ms"] > 0 and row["peak_rss_bytes"] is None
    page = output.with_suffix(".html").read_text()
    assert page.count("<svg") == 1 + 2 * 3 and "<script" not in page and "http" not in page
    assert output.with_suffix(".csv").read_text().startswith("scenario,point,")

    again = tmp_path / "again.json"
    assert run([*command, "--schedule", str(schedule), "--output", str(again)]) == 0
    hashes = [
        [point["schedule_sha256"] for point in json.loads(path.read_text())["points"]] for path in (output, again)
    ]
    assert hashes[0] == hashes[1]
    capfd.readouterr()
    assert run(["bench", "compare", str(output), str(again)]) == 0
    assert "too few repeats" in capfd.readouterr().out
    assert run(["bench", "gate", str(output), "--budget", "p50_e2e_ms<=60000"]) == 0
    fails(["bench", "gate", str(output), "--budget", "p50_e2e_ms<=0.0001"], 1, "p50_e2e_ms is")


def test_what_cannot_be_measured_is_refused_in_one_line(built, fails, monkeypatch):
    command = ["bench", str(built.bundle), "--scenario", "single"]
    fails([*command, "--target", "ort/fp33"], 2, "ort/fp32")
    fails([*command, "--target", "ort/fp32", "--stand-in", "other"], 2, "none of the targets")
    monkeypatch.setenv("TENSORFLOW_MODEL_SERVER", "no-such-binary")
    fails([*command, "--target", "tfserving"], 1, "TENSORFLOW_MODEL_SERVER names 'no-such-binary'")


def test_the_client_itself_is_measured_in_its_own_process():
    overhead = asyncio.run(client_overhead(WallClock(), count=3, tokens=4))
    assert all(value >= 0 for values in overhead.values() for value in values)
    assert overhead["ttft_ms"][0] <= overhead["e2e_ms"][2]


@pytest.mark.slow
def test_a_server_of_known_latency_is_measured_within_one_percent():
    async def work():
        with fake_server(first=0.5, step=0.05) as target:
            schedule = Planner(range(50), 48).server(20, Lengths(4, 4), Lengths(9, 9), rate=10, arrivals="constant")
            return await measure([target], [schedule], WallClock(), repeats=1, objectives=Objectives(ttft=1.0))

    row = asyncio.run(work())["points"][0]["rows"][0]
    found = {name: values[0] for name, values in row["figures"].items()}
    expected = {"p50_ttft_ms": 500, "p50_inter_token_ms": 50, "p50_tpot_ms": 50, "p50_e2e_ms": 900}
    expected |= {"output_tokens_per_second": 180 / 2.8, "requests_per_second": 20 / 2.8, "goodput": 20 / 2.8}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=0.01)
    assert row["all_counted"] and row["peak_rss_bytes"] > 1 << 20
