"""A whole run in virtual time: figures to the percent, equal runs called equal, a slower one called out."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from dataclasses import replace

import pytest

from benchmarks.suite.figures.latency_metrics import Objectives
from benchmarks.suite.load.schedule import Lengths, Planner
from benchmarks.suite.record import read_record
from benchmarks.suite.regression_gate import BudgetError, changes, check_baseline, check_budgets, compare
from benchmarks.suite.report.markdown import to_markdown
from benchmarks.suite.report.tables import to_csv
from benchmarks.suite.resume import Earlier
from benchmarks.suite.run import measure
from benchmarks.suite.targets.base import Completion
from serving.errors import InputError, RuntimeMissingError
from tests.benchmarks.suite.virtual_clock import LoopClock, run_virtual

CLOCK = LoopClock()


class Known:
    """First token after 100 ms and a further one each 20 ms, each times `slower` and up to 1 % of noise."""

    label, precision, emulator = "known", None, True

    def __init__(self, name, slower=1.0, seed=0, token=7):
        self.name, self.slower, self.random, self.token = name, slower, random.Random(seed), token

    async def start(self):
        pass

    async def stop(self):
        pass

    def pid(self):
        return None

    async def send(self, request):
        times, started = [], CLOCK.now()
        for index in range(request.new_tokens):
            noise = 1 + self.random.uniform(-0.01, 0.01)
            await asyncio.sleep((0.02 if index else 0.1) * self.slower * noise)
            times.append(CLOCK.now())
        return Completion(tuple(times), times[-1], started=started, tokens=(self.token,) * request.new_tokens)


def record(*targets, repeats=7):
    planner = Planner(range(50), 48)
    lengths = Lengths(4, 4), Lengths(11, 11)
    schedules = [planner.single(10, *lengths), planner.server(20, *lengths, rate=10, arrivals="constant")]
    objectives = Objectives(ttft=0.11, e2e=1.0)
    made = run_virtual(measure(list(targets), schedules, CLOCK, repeats=repeats, objectives=objectives))
    # What others do on the tests' machine is no part of virtual time.
    return made | {"others_cpu_share": 0.0}


def test_every_figure_is_right_within_one_percent():
    made = record(Known("a"))
    single, server = (point["rows"][0]["figures"] for point in made["points"])
    for figures in (single, server):
        for figure, expected in (("ttft", 100), ("inter_token", 20), ("tpot", 20), ("e2e", 300)):
            assert figures[f"p50_{figure}_ms"] == pytest.approx([expected] * 7, rel=0.01)
            assert figures[f"mean_{figure}_ms"] == pytest.approx([expected] * 7, rel=0.01)
        assert figures["p99_queue_ms"] == pytest.approx([0] * 7, abs=1e-6)
    assert single["requests_per_second"] == pytest.approx([1 / 0.3] * 7, rel=0.01)
    assert single["output_tokens_per_second"] == pytest.approx([11 / 0.3] * 7, rel=0.01)
    assert single["goodput"] == single["requests_per_second"]
    # 20 requests, 0.1 s apart, the last of which takes 0.3 s.
    assert server["requests_per_second"] == pytest.approx([20 / 2.2] * 7, rel=0.01)
    assert server["input_tokens_per_second"] == pytest.approx([80 / 2.2] * 7, rel=0.01)
    json.dumps(made, allow_nan=False)


class Breaks(Known):
    """Ends the whole run with its request of this number."""

    def __init__(self, name, at):
        super().__init__(name)
        self.left = at

    async def send(self, request):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return await super().send(request)


def test_a_run_that_was_ended_goes_on_with_what_is_whole():
    planner, lengths = Planner(range(50), 48), (Lengths(4, 4), Lengths(11, 11))
    sweep = planner.saturation(*lengths, start=2, factor=2, seconds=2, rates=4, arrivals="constant")
    schedules = [planner.single(5, *lengths), *sweep, planner.offline(5, *lengths)]
    kept = []

    def measured(target, repeats=5, **how):
        return run_virtual(measure([target], schedules, CLOCK, repeats=repeats, objectives=Objectives(), **how))

    # It goes in the sweep, which is begun anew, as no target may have left it by halves.
    with pytest.raises(KeyboardInterrupt):
        measured(Breaks("a", 100), keep=lambda made: kept.append(copy.deepcopy(made)))
    assert [[point["point"] for point in made["points"]] for made in kept] == [["one at a time"]]
    whole = measured(Known("a"), keep=lambda made: kept.append(copy.deepcopy(made)))
    assert [len(made["points"]) for made in kept] == [1, 1, 6, 7]

    asked = Breaks("a", 10**6)
    again = measured(asked, earlier=Earlier(kept[2]))
    # Only all at once was asked for, five times, behind ten or more requests to warm up.
    assert 5 * 5 + 10 <= 10**6 - asked.left <= 5 * 5 + 60
    assert [point["schedule_sha256"] for point in again["points"]] == [
        point["schedule_sha256"] for point in whole["points"]
    ]
    assert again["points"][:6] == whole["points"][:6] and len(again["sessions"]) == 2
    for change, words in (({"repeats": 6}, "other settings;"), ({"name": "b"}, "other targets;")):
        target = Known(change.pop("name", "a"))
        with pytest.raises(InputError, match=words):
            measured(target, earlier=Earlier(kept[2]), **change)
    elsewhere = kept[2] | {"environment": kept[2]["environment"] | {"cpu": "another", "versions": {}}}
    with pytest.raises(InputError, match="other machine and versions; delete it, or leave out --resume"):
        measured(Known("a"), earlier=Earlier(elsewhere))


def test_two_alike_have_no_winner_and_ten_percent_have_one():
    alike = record(Known("a", seed=1), Known("b", seed=2))
    assert {name for point in alike["points"] for name in point["winners"].values()} == {None}
    slower = record(Known("a", slower=1.1, seed=1), Known("b", seed=2))
    assert set(slower["points"][0]["winners"].values()) == {"b"}


def test_two_runs_of_the_same_are_equal_and_a_slow_down_is_worse():
    before, again, slow = record(Known("a", seed=1)), record(Known("a", seed=2)), record(Known("a", slower=1.1, seed=3))
    assert {change.word for change in changes(before, again)} == {"not distinguishable"}
    assert compare(before, again)[-1].split() == ["in", "all", "10", "not", "distinguishable"]
    worse = [line for line in compare(before, slow) if "one at a time" in line]
    assert len(worse) == 5 and all(line.strip().startswith("WORSE") for line in worse)
    assert "+10." in worse[0] or "+9." in worse[0]
    assert any(line.strip().startswith("better") for line in compare(slow, before))


def test_a_machine_that_was_slower_is_said():
    before = record(Known("a")) | {"read_bandwidth_bytes_per_second": 50e9, "fp32_flops_per_second": 100e9}
    after = before | {"read_bandwidth_bytes_per_second": 45e9, "fp32_flops_per_second": 101e9}
    assert "memory reads -10.0%;" in compare(before, after)[-1] and "products" not in compare(before, after)[-1]
    assert len(compare(before, before)) == 2 * 5 + 1
    busy = compare(before, before | {"others_cpu_share": 0.64})
    assert "others  took 0% of the cores before and 64% after" in busy[-1] and len(busy) == 2 * 5 + 2


def test_a_baseline_is_kept_by_its_like_and_not_by_a_slow_down():
    before, again, slow = record(Known("a", seed=1)), record(Known("a", seed=2)), record(Known("a", slower=1.1, seed=3))
    assert check_baseline(again, before, 0.0) == compare(before, again)
    with pytest.raises(BudgetError, match=r"WORSE  a \(emulator\), one at a time, p50_ttft_ms: .* \(\+\d") as caught:
        check_baseline(slow, before, 0.05)
    assert "one at a time, output_tokens_per_second" in str(caught.value), "of which more is better"
    assert "WORSE" in "".join(check_baseline(slow, before, 0.15))
    assert check_baseline(before, slow, 0.0)


def test_a_row_that_is_gone_or_fails_does_not_keep_a_baseline():
    both, one = record(Known("a", seed=1), Known("b", seed=2)), record(Known("a", seed=1))
    with pytest.raises(BudgetError, match=r"^b .emulator., one at a time: not in the record; b .*, 10 a second"):
        check_baseline(one, both, 1.0)
    assert "only before  b (emulator), one at a time" in "\n".join(compare(both, one))
    assert "only after  b (emulator), one at a time" in "\n".join(compare(one, both))
    failed = copy.deepcopy(one)
    failed["points"][0]["rows"][0]["errors"] = ["it went away"]
    with pytest.raises(BudgetError, match=r"^a \(emulator\), one at a time: it went away$"):
        check_baseline(failed, one, 1.0)
    assert "failed  a (emulator), one at a time: it went away" in "\n".join(compare(one, failed))


def test_records_of_two_bundles_are_compared_and_named():
    before, after = record(Known("a")) | {"bundle": "old"}, record(Known("a")) | {"bundle": "new"}
    assert compare(before, after)[-1].strip() == "the bundle  was old, is new"


def test_what_was_not_asked_for_by_name_and_does_not_start_is_named_and_left_out():
    class Absent(Known):
        async def start(self):
            raise RuntimeMissingError("it is not installed here")

    async def work(targets, missing):
        schedule = Planner(range(50), 48).single(2, Lengths(4, 4), Lengths(3, 3))
        return await measure(targets, [schedule], CLOCK, repeats=1, objectives=Objectives(), missing=missing)

    made = run_virtual(work([Absent("b"), Known("a")], {"c": "elsewhere"}))
    assert made["not_measured"] == {"c": "elsewhere", "b": "it is not installed here"}
    assert [each["name"] for each in made["targets"]] == ["a"] == [row["target"] for row in made["points"][0]["rows"]]
    assert "- b was not measured: it is not installed here" in to_markdown(
        {"bundle": "x", "client_overhead_ms": None} | made
    )
    for targets, missing in (([Absent("b"), Known("a")], None), ([Absent("b")], {})):
        with pytest.raises(RuntimeMissingError):
            run_virtual(work(targets, missing))


def test_budgets():
    made = record(Known("a"), repeats=1)
    assert len(check_budgets(made, ["p99_inter_token_ms<=21", "requests_per_second >= 3"])) == 4
    with pytest.raises(BudgetError, match=r"p99_inter_token_ms is 20\.\d+, the budget <=15"):
        check_budgets(made, ["p99_inter_token_ms<=15"])
    for wrong in ("p99_inter_token_ms<15", "p98_inter_token_ms<=15", "p99_inter_token_ms<=e"):
        with pytest.raises(InputError):
            check_budgets(made, [wrong])


def test_other_tokens_and_stand_ins_are_said_in_the_tables():
    made = record(Known("a"), Known("b", token=8), repeats=1)
    text = to_markdown(made)
    assert "a (emulator)" in text and "OUTPUTS DIFFER within one precision: a (emulator) | b (emulator)" in text
    assert len(to_csv(made).splitlines()) == 1 + 2 * 2 * len(made["points"][0]["rows"][0]["figures"])


def test_ids_are_compared_with_a_servers_text():
    class Text(Known):
        async def send(self, request):
            return replace(await super().send(request), tokens=None, text="7" * request.new_tokens)

    schedule = Planner(range(50), 48).single(2, Lengths(4, 4), Lengths(3, 3))
    targets = [Known("a"), Text("b"), Known("c", token=8)]
    decode = lambda ids: "".join(map(str, ids))  # noqa: E731
    made = run_virtual(measure(targets, [schedule], CLOCK, repeats=1, objectives=Objectives(), decode=decode))
    text = to_markdown({"bundle": "x", "client_overhead_ms": None} | made)
    assert "one precision: a (emulator), b (emulator) | c (emulator)" in text


def test_what_is_no_record_is_refused(tmp_path):
    path = tmp_path / "r.json"
    schema = '{"schema": "gpt2-bundle-bench/2", "points": '
    for text, why in {
        "{": "not a record", "": "not a record", "[]": "it has no schema", '{"rows": []}': "it has no schema",
        '{"schema": "other"}': "its schema is 'other'", schema + "[1]}": "not a record",
        schema + "[]}": "nothing was measured", schema[:-2] + " [], " + '"x": 1}': "not a record",
        '{"schema": "gpt2-bundle-bench/2"}': "it lacks 'points'", schema + '[{"rows": [{}]}]}': "it lacks",
    }.items():  # fmt: skip
        path.write_text(text)
        with pytest.raises(InputError, match=why) as caught:
            read_record(path)
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="No such file"):
        read_record(tmp_path / "nowhere.json")
