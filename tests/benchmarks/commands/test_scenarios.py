"""The command: a scenario from bundle to record, tables and page; compare and gate; and the suite's own check."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
import time

import pytest

from benchmarks.commands import scenarios
from benchmarks.common import hardware
from benchmarks.common.hardware import own_seconds, usable_cores
from benchmarks.suite.driver import play
from benchmarks.suite.figures.latency_metrics import Objectives
from benchmarks.suite.figures.record_rows import Repeat, figures
from benchmarks.suite.load.clock import WallClock
from benchmarks.suite.machine.meters import Reading
from benchmarks.suite.selfcheck import selftest
from benchmarks.suite.selfcheck.client_overhead import client_overhead, fake_process, lateness
from benchmarks.suite.selfcheck.selftest import FIRST, PRICE, STEP, Check, expected, schedules
from benchmarks.suite.targets.base import Completion
from serving.cli import run
from tests.benchmarks.suite.virtual_clock import LoopClock, run_virtual


@pytest.fixture(autouse=True)
def small_probe(monkeypatch):
    monkeypatch.setattr(hardware, "_BYTES", 1 << 20)
    monkeypatch.setattr(hardware, "_SIDE", 64)


def test_from_a_bundle_to_a_record_and_back(built, tmp_path, capfd, fails):
    output = tmp_path / "r.json"
    command = ["bench", str(built.bundle), "--target", "ort/fp32", "--repeats", "2", "--requests", "3"]
    command += ["--scenario", "single", "--scenario", "concurrency", "--clients", "2", "--clients", "3"]
    limit = ["--slo-e2e", "10000", "--output", str(output)]
    assert run([*command, *limit]) == 0
    record = json.loads(output.read_text())
    assert [point["scenario"] for point in record["points"]] == ["single", "concurrency", "concurrency"]
    row = record["points"][0]["rows"][0]
    assert row["summary"]["requests"] == 6 and row["summary"]["failed"] == 0
    assert row["figures"]["goodput"] == row["figures"]["requests_per_second"]
    assert row["bound_inter_token_ms"] > 0 and row["peak_rss_bytes"] is None
    page = output.with_suffix(".html").read_text()
    assert page.count('role="img"') == 2 + 2 * 3 and "<script" not in page and "http" not in page
    assert output.with_suffix(".csv").read_text().startswith("scenario,point,")

    again = tmp_path / "again.json"
    assert run([*command, "--output", str(again)]) == 0
    hashes = [
        [point["schedule_sha256"] for point in json.loads(path.read_text())["points"]] for path in (output, again)
    ]
    assert hashes[0] == hashes[1]

    left = output.with_name("r.json.unfinished")
    assert not left.exists()
    left.write_text(json.dumps(record | {"points": record["points"][:1]}))
    limit.append("--resume")
    assert run([*command, *limit]) == 0
    assert "single, one at a time: is there already" in capfd.readouterr().err
    resumed = json.loads(output.read_text())
    assert resumed["points"][0] == record["points"][0] and resumed["points"][1:] != record["points"][1:]
    assert len(resumed["points"]) == 3 and len(resumed["sessions"]) == 2 and not left.exists()
    assert "Measured in 2 runs" in output.with_suffix(".html").read_text()
    left.write_text(json.dumps(record | {"manifest_sha256": "0"}))
    fails([*command, *limit], 2, "of another bundle")
    left.write_text(json.dumps(record | {"targets": []}))
    fails([*command, *limit], 2, "other targets; delete it")
    fails([*command, "--scenario", "single", "--resume"], 2, "--output")
    left.unlink()
    assert run(["bench", "compare", str(output), str(again)]) == 0
    assert "too few repeats" in capfd.readouterr().out
    fails(["bench", "gate", str(output), "--baseline", str(again)], 2, "too few repeats to tell anything")
    fails(["bench", "gate", str(output), "--baseline", str(again), "--allow", "nan"], 2, "'nan' is not a number")
    assert run(["bench", "gate", str(output), "--budget", "p50_e2e_ms<=60000"]) == 0
    fails(["bench", "gate", str(output), "--budget", "p50_e2e_ms<=0.0001"], 1, "p50_e2e_ms is")
    slow = json.loads(output.read_text())
    for factor, path in ((1.0, output), (1.1, again)):
        for row in (row for point in slow["points"] for row in point["rows"]):
            row["figures"]["p50_e2e_ms"] = [factor * value for value in (99.5, 100, 100, 100, 100.5)]
        path.write_text(json.dumps(slow))
    assert run(["bench", "gate", str(again), "--baseline", str(output), "--allow", "15"]) == 0
    fails(["bench", "gate", str(again), "--baseline", str(output)], 1, "p50_e2e_ms: 100.000 -> 110.000 (+10.0%")
    fails(["bench", "gate", str(output)], 2, "nothing to hold the record to")
    fails(["bench", "gate", str(again), "--baseline", str(tmp_path / "none.json")], 2, "none.json: not a record")


def test_what_cannot_be_measured_is_refused_in_one_line(built, fails, monkeypatch):
    command = ["bench", str(built.bundle), "--scenario", "single"]
    fails([*command, "--target", "ort/fp33"], 2, "ort/fp32")
    swept = ["bench", str(built.bundle), "--target", "ort/fp32", "--scenario", "saturation"]
    fails([*swept, "--sweep-factor", "1"], 2, "not in the range 1<x<=100")
    fails([*command, "--target", "ort/fp32", "--emulator", "other"], 2, "not among the targets")
    fails([*command, "--target", "ort/fp32", "--emulator", "ort/fp32"], 2, "cannot be an emulator")
    monkeypatch.setenv("TENSORFLOW_MODEL_SERVER", "no-such-binary")
    fails([*command, "--target", "tfserving"], 1, "TENSORFLOW_MODEL_SERVER names 'no-such-binary'")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--slo-ttft", "nan", "--scenario", "single"], "'nan' is not a number"),
        (["--slo-e2e", "-1", "--scenario", "single"], "--slo-e2e"),
        (["--price-per-hour", "inf", "--scenario", "single"], "'inf' is not a number"),
        (["--price-per-hour", "3"], "--price-per-hour is read with --scenario single or"),
        (["--sweep-limit", "nan", "--scenario", "saturation"], "'nan' is not a number"),
        (["--rate", "1e-300", "--scenario", "server"], "a higher rate"),
        (["--sweep-from", "1e-300", "--scenario", "saturation"], "a higher rate"),
        (["--resume"], "--output"),
        (["--clients", "3"], "--clients is read with --scenario concurrency"),
        (["--clients", "3", "--scenario", "single"], "--clients is read with --scenario concurrency"),
        (["--batch-size", "3", "--scenario", "single"], "--batch-size is read with --scenario steps"),
        (["--requests", "3", "--scenario", "saturation"], "--requests is read with --scenario single or"),
        (["--trace", "t"], "--trace is read with --scenario server"),
        (["--trace", "t", "--scenario", "server", "--rate", "1"], "leave out --rate"),
        (["--trace", "t", "--scenario", "server", "--scenario", "steps", "--requests", "1"], "leave out --requests"),
        (["--trace", "t", "--scenario", "server", "--arrivals", "gamma"], "leave out --arrivals"),
        (["--scenario", "steps", "--new-tokens", "500"], "do not fit a context of 48"),
    ],
)
def test_an_option_is_read_or_refused(built, fails, options, words):
    fails(["bench", str(built.bundle), "--target", "ort/fp32", "--repeats", "1", *options], 2, words)


def test_a_trace_is_replayed_whole(built, tmp_path, fails):
    trace, output = tmp_path / "t.txt", tmp_path / "r.json"
    command = ["bench", str(built.bundle), "--target", "ort/fp32", "--repeats", "1", "--scenario", "server"]
    fails([*command, "--trace", str(tmp_path)], 2, "not a list of arrival times")
    command += ["--trace", str(trace)]
    for text, words in (
        ("0\nnan\n", "nan is not a time"),
        ("inf", "inf is not a time"),
        ("\n", "is empty"),
        ("a", "'a'"),
    ):
        trace.write_text(text)
        fails(command, 2, words)
    trace.write_text("0\n1e9\n")
    fails(command, 2, "ends within 604800 s")
    trace.write_text("".join(f"{1e9 + number / 1e3}\n" for number in reversed(range(20))))
    more = ["--output-lengths", "2", "--price-per-hour", "2", "--output", str(output)]
    assert run([*command, *more]) == 0
    record = json.loads(output.read_text())
    (point,) = record["points"]
    # The times themselves are those of the schedule's own test.
    assert point["rows"][0]["summary"]["requests"] == 20 == point["settings"]["requests"]
    (cost,), (rate,) = (
        point["rows"][0]["figures"][name] for name in ("cost_per_million_tokens", "output_tokens_per_second")
    )
    assert point["point"] == "trace" and cost == pytest.approx(2 / 3600 / rate * 1e6)
    assert "Cost is at a price of 2 an hour." in output.with_suffix(".html").read_text()
    assert "cost of 1M tokens" in output.with_suffix(".md").read_text()


def test_where_no_record_can_be_written_nothing_is_measured(built, tmp_path, fails, monkeypatch):
    (tmp_path / "folder.json").mkdir()
    command = ["bench", str(built.bundle), "--target", "ort/fp32", "--repeats", "1", "--output"]
    fails([*command, str(tmp_path / "folder.json")], 2, "is a folder; name a file in it")
    for suffix in (".md", ".csv", ".html"):
        fails([*command, str(tmp_path / f"r{suffix}")], 2, f"{suffix} is written next to it; name it", "r.json")
    (tmp_path / "file").touch()
    fails([*command, str(tmp_path / "file" / "r.json")], 1, "check the path")
    monkeypatch.setattr(scenarios.os, "access", lambda path, mode: mode != os.W_OK)
    fails([*command, str(tmp_path / "r.json")], 2, "cannot be written to")


def test_the_client_itself_is_measured_in_its_own_process():
    overhead = asyncio.run(client_overhead(WallClock(), count=3, tokens=4))
    assert all(value >= 0 for values in overhead.values() for value in values)
    assert overhead["ttft_ms"][0] <= overhead["e2e_ms"][2]


def test_what_others_take_from_the_cores_is_told(built, tmp_path):
    output = tmp_path / "r.json"
    command = ["bench", str(built.bundle), "--target", "ort/fp32", "--scenario", "single", "--repeats", "3"]
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(usable_cores())]
    try:
        assert run([*command, "--output", str(output), "--requests", "40"]) == 0
    finally:
        for process in busy:
            process.kill()
            process.wait()
    record = json.loads(output.read_text())
    assert 0.2 < record["others_cpu_share"] <= 1
    assert "Other programs took" in output.with_suffix(".html").read_text()


def test_time_of_a_process_is_counted_as_it_runs():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        before = own_seconds([process.pid])
        while own_seconds([process.pid]) < before + 0.05:
            time.sleep(0.01)
        process.kill()


def test_a_fake_server_says_how_late_it_was():
    with fake_process(0.01, 0.01) as (address, _):
        assert lateness(address) == 0.0


def test_a_cold_start_is_a_process_of_its_own(built, tmp_path):
    output = tmp_path / "r.json"
    command = ["bench", str(built.bundle), "--target", "ort/fp32", "--scenario", "cold-start", "--cold-starts", "1"]
    assert run([*command, "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    (row,) = record["points"][0]["rows"]
    load, first = (row["figures"][name][0] for name in ("cold_load_ms", "cold_first_token_ms"))
    # A new Python with a runtime takes far longer than what is open already.
    assert 50 < load < first and row["errors"] == [] and row["peak_rss_bytes"] > 20 << 20
    assert load / 1e3 > record["targets"][0]["load_seconds"]


def test_what_the_selftest_expects_is_what_comes_in_virtual_time():
    """The selftest's own arithmetic, and the suite's, of a server that is never late."""

    class Exact:
        name = label = "exact"
        precision, emulator = None, False

        def pid(self):
            return None

        async def send(self, request):
            loop, times = LoopClock(), []
            for index in range(request.new_tokens):
                await asyncio.sleep(STEP if index else FIRST)
                times.append(loop.now())
            return Completion(tuple(times), times[-1])

    objectives = Objectives(e2e=FIRST + 2.5 * STEP)
    for schedule in schedules():
        found = figures(Repeat(run_virtual(play(schedule, Exact(), LoopClock()))), objectives, PRICE)
        wanted = expected(schedule, objectives)
        assert {name: found[name] for name in wanted} == pytest.approx(wanted)
        # The check covers all figures of a repeat except those of meters.
        assert set(found) - set(wanted) == set(Reading().figures(0))


def lying_try(error, late):
    async def once(schedule):
        return [Check(schedule.point, "p50_ttft_ms", 400.0 * (1 + next(error)), 400.0)], next(late)

    return once


def test_the_selftest_blames_the_suite_only_while_nothing_was_late(monkeypatch):
    still, late, said = itertools.repeat(0.0), itertools.repeat(0.1), []
    monkeypatch.setattr(selftest, "_try", lying_try(itertools.repeat(0.02), still))
    with pytest.raises(selftest.SelfTestError, match="1 of 1 figures are not within 1 %: p50_ttft_ms is 408"):
        selftest.run_selftest(said.append)
    monkeypatch.setattr(selftest, "_try", lying_try(itertools.cycle([0.02, 0.001]), late))
    assert len(selftest.run_selftest(said.append)) == len(said) == len(schedules())
    assert "p50_ttft_ms is off by 2.0%, but the machine was 100.0 ms late; again" in said[0]
    monkeypatch.setattr(selftest, "_try", lying_try(itertools.repeat(0.02), late))
    with pytest.raises(selftest.SelfTestError, match="no verdict, since the machine was late at every try"):
        selftest.run_selftest(said.append)


@pytest.mark.slow
def test_a_server_of_known_latency_is_measured_within_one_percent(capfd):
    code = run(["bench", "selftest"])
    out, err = capfd.readouterr()
    if "no verdict" in err:
        pytest.skip("the machine was too busy for a verdict")
    assert code == 0 and out.count("figures within 1 %") == 3
