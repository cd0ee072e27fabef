"""The page of a record with every scenario: what is on it, that it stands alone, and that a phone can show it."""

from __future__ import annotations

import contextlib
import copy
import re
import types

import pytest

from benchmarks.common.static_batch import BatchRun
from benchmarks.suite import static_batches
from benchmarks.suite.cold_start import ColdStart
from benchmarks.suite.figures.latency_metrics import Objectives
from benchmarks.suite.figures.roofline import prompt_flops, step_bytes, token_flops
from benchmarks.suite.load.schedule import Lengths, Planner
from benchmarks.suite.machine.contention import Machine
from benchmarks.suite.machine.meters import Meters, Reading
from benchmarks.suite.report.html import to_page
from benchmarks.suite.report.markdown import to_markdown
from benchmarks.suite.report.rankings import differing, needs, rankings, recommendations
from benchmarks.suite.run import measure
from benchmarks.suite.targets.base import TargetError
from tests.benchmarks.suite.figures.test_roofline import GEOMETRY
from tests.benchmarks.suite.test_rate_sweep import Queue
from tests.benchmarks.suite.virtual_clock import LoopClock, run_virtual
from tests.serving.chromium import CHROMIUM, browser

LENGTHS = Lengths(4, 4), Lengths(5, 5)


class Probe:
    """A machine that reads 1 GB and does 0.5 GFLOP a second."""

    def __init__(self, rate):
        self.samples = [rate]

    def sample(self, passes):
        pass


class FixedMeters(Meters):
    """60 J of the processor and 140 J of a GPU in each window."""

    @contextlib.contextmanager
    def window(self):
        yield types.SimpleNamespace(reading=Reading(4.0, 60.0, 140.0, 75.0, 3 << 30))

    def describe(self, idle_seconds=5.0):
        return {"gpus": ["GPU 0"], "driver": "570.1", "idle_cpu_watts": 9.6, "idle_gpu_watts": None}


class Runner:
    """A graph whose prompts and steps take a time each; token ids count up from the last."""

    def __init__(self, seconds, shift=0):
        self.seconds, self.shift = seconds, shift

    def run(self, prompts, new_tokens):
        first = [prompt[-1] + self.shift for prompt in prompts]
        tokens = [[(token + step) % 64 for token in first] for step in range(new_tokens + 1)]
        return BatchRun(3 * self.seconds, [self.seconds] * new_tokens, tokens)


@pytest.fixture(scope="module")
def record():
    static_batches._PAUSE = 0.0
    planner = Planner(range(50), 32)
    schedules = [
        *(planner.steps(batch, 4, 3) for batch in (1, 2)),
        planner.single(5, *LENGTHS),
        planner.offline(5, *LENGTHS),
        planner.server(8, *LENGTHS, rate=4),
        *(planner.concurrency(clients, 8, *LENGTHS) for clients in (1, 2, 4)),
        *planner.saturation(*LENGTHS, start=2, factor=2, seconds=4, rates=8, arrivals="constant"),
        planner.cold_start(*LENGTHS),
    ]
    targets = [Queue("<quick>", 0.01), Queue("slow", 0.1), Queue("elsewhere", 0.3)]
    for target in targets:
        target.precision = "fp32"
    targets[0].runner, targets[1].runner = Runner(0.001), Runner(0.004, shift=1)

    async def start(target, request):
        if target.name == "slow":
            raise TargetError("it fell over")
        return ColdStart(1.5, 2.5, 64 << 20) if target.name == "<quick>" else None

    machine = Machine(Probe(1e9), Probe(5e8), FixedMeters(), price_per_hour=1.8)
    work = measure(
        targets, schedules, LoopClock(), repeats=5, objectives=Objectives(e2e=2.0), geometry=GEOMETRY,
        machine=machine, starter=start, cold_starts=2, timeout=1e3,
    )  # fmt: skip
    return run_virtual(work) | {"bundle": "tiny", "client_overhead_ms": None}


def test_every_scenario_is_on_the_page_and_it_stands_alone(record):
    page = to_page(record).decode()
    headings = ["Recommendations", "Rankings", "What each target needs", "Static batches", "Latency and throughput"]
    headings += ["One request at a time", "All at once", "Open-loop arrivals", "Several clients: 4 clients"]
    headings += ["Highest rate sustained", "Cold starts"]
    for heading in headings:
        assert f"<h2>{heading}" in page, heading
    assert not re.search(r"https?://|src=|@import|<script", page)
    assert "<quick>" not in page and "&lt;quick&gt;" in page
    # Two for batch sizes, rates and clients each, two a point for six points.
    assert page.count('role="img"') == 2 + 2 + 2 + 2 * 6
    assert "slow (emulator): it fell over" in page and "1,500" in page and "64.0" in page


def test_cold_starts_are_null_where_nobody_can_start_the_target(record):
    rows = {row["target"]: row for row in record["points"][-1]["rows"]}
    assert rows["<quick>"]["figures"] == {"cold_load_ms": [1500] * 2, "cold_first_token_ms": [2500] * 2}
    assert rows["elsewhere"]["figures"] == {"cold_load_ms": [None] * 2, "cold_first_token_ms": [None] * 2}
    assert rows["elsewhere"]["errors"] == [] and rows["slow"]["errors"] == ["it fell over"]
    assert "| elsewhere (emulator) | none | none |" in to_markdown(record)


def test_the_floors_are_in_the_record(record):
    row = record["points"][2]["rows"][1]
    assert row["roofline"] is None
    # A token looks at the prompt and half the output on average.
    assert row["bound_ttft_ms"] == pytest.approx(prompt_flops(GEOMETRY, 4) / 5e8 * 1e3)
    assert row["bound_inter_token_ms"] == pytest.approx(step_bytes(GEOMETRY, "fp32", 1, 4 + 5 / 2) / 1e9 * 1e3)
    assert record["read_bandwidth_bytes_per_second"] == 1e9 and record["fp32_flops_per_second"] == 5e8


def test_steps_are_of_graphs_here_with_floors_of_the_whole_batch(record):
    one, two = record["points"][:2]
    assert [point["point"] for point in (one, two)] == ["batch 1", "batch 2"]
    quick, slow = two["rows"]
    assert [row["target"] for row in two["rows"]] == ["<quick>", "slow"]
    assert two["winners"] == {"prefill_ms": "<quick>", "step_ms": "<quick>"}
    known = {"prefill_ms": [12.0] * 5, "step_ms": [4.0] * 5, "step_tokens_per_second": [500.0] * 5}
    # Two rows of a prefill's token and of three steps'.
    assert slow["figures"].items() >= (known | {"joules_per_token": [200 / 8] * 5}).items()
    assert slow["intervals_ms"] == {"prefill_ms": [12.0, 12.0], "step_ms": [4.0, 4.0]}
    # One answers from the prompt's last token on, the other from the one behind it.
    assert quick["differing_requests"] == {"slow": [0, 1]}
    read = step_bytes(GEOMETRY, "fp32", 2, 4 + 3 / 2)
    assert slow["bound_inter_token_ms"] == pytest.approx(
        max(read / 1e9, 2 * token_flops(GEOMETRY, 4 + 3 / 2) / 5e8) * 1e3
    )
    assert slow["roofline"]["decode"]["intensity"] == pytest.approx(2 * token_flops(GEOMETRY, 5.5) / read)
    assert slow["bound_inter_token_ms"] > one["rows"][1]["bound_inter_token_ms"]


def test_the_page_begins_with_what_to_take_and_its_figures(record):
    found = {each.use: each for each in recommendations(record)}
    # Nobody else has a cold start or a process of its own, so that nothing is best in those.
    assert [use.split(":")[0] for use in found] == [
        "one at a time",
        "4 a second, poisson",
        "most tokens",
        "highest rate kept up with",
    ]
    alone, kept = found["one at a time"], found["highest rate kept up with"]
    assert alone.targets == ("<quick> (emulator)",) and alone.others == ""
    figures = alone.figures
    assert (alone.value, figures["first token, ms"], figures["between tokens, ms"]) == pytest.approx((10, 2, 2))
    assert figures["tokens/s"] == pytest.approx(500) and figures["peak memory, MiB"] == 64
    assert figures["/ bound"] == pytest.approx(2 / record["points"][2]["rows"][0]["bound_inter_token_ms"])
    # One of 0.01 s keeps up with 64 a second and not with 128.
    assert (kept.value, kept.unit) == (64, "requests/s")
    assert differing(record) == "OUTPUTS DIFFER at steps, batch 1; steps, batch 2"
    page, text = to_page(record).decode(), to_markdown(record)
    assert page.index("10.0 ms a request") < page.index("<h2>Rankings")
    assert text.index("10.0 ms a request") < text.index("### Static batches")


def test_what_is_not_told_apart_from_the_best_is_named_with_it():
    def row(name, values):
        empty = {figure: [1.0] * 5 for figure in ("p50_ttft_ms", "p50_inter_token_ms", "output_tokens_per_second")}
        return {
            "target": name, "precision": "fp32", "emulator": name == "d", "errors": [], "all_counted": True,
            "peak_rss_bytes": None,
            "bound_inter_token_ms": None, "differing_requests": {}, "figures": empty | {"p50_e2e_ms": values},
        }  # fmt: skip

    noisy = [10.0, 12.0, 9.0, 11.0, 10.5]
    rows = [row("worst", [30.0] * 5)] + [row(name, noisy[place:] + noisy[:place]) for place, name in enumerate("abcde")]
    point = {"scenario": "single", "point": "one at a time", "rows": rows}
    targets = [{"name": each["target"], "emulator": each["emulator"], "precision": "fp32"} for each in rows]
    (found,) = recommendations({"points": [point], "targets": targets})
    assert sorted(found.targets) == ["a", "b", "c", "d (emulator)", "e"]
    assert found.others.endswith(", and 1 more") and found.figures["peak memory, MiB"] is None


def test_the_summary_names_the_best_and_is_silent_within_the_noise(record):
    found = {each.question: each for each in rankings(record)}
    assert found["batch 2: decode step, ms"].winner == "<quick> (emulator)"
    order = found["batch 2: decode step, ms"].order
    assert [name for name, _ in order] == ["<quick> (emulator)", "slow (emulator)"]
    assert found["one at a time: first token, ms"].winner == "<quick> (emulator)"
    ratio, low, high, noise = found["one at a time: first token, ms"].second
    assert low <= ratio <= high and ratio == pytest.approx(10) and noise == pytest.approx(0, abs=1e-6)
    judged = record["points"][2]["comparisons"]["p50_ttft_ms"]
    assert (judged["best"], judged["winner"]) == ("<quick>", "<quick>")
    assert judged["over_best"]["slow"]["ratio"] == ratio
    rate = found["sustained, requests/s"]
    assert rate.order[0][0] == "<quick> (emulator)" and rate.order[0][1] > rate.order[-1][1]
    # Nobody else has a cold start, so that nothing is ranked there.
    assert "from process start to first token, ms" not in found
    again = copy.deepcopy(record)
    again["points"][1]["winners"]["step_ms"] = None
    assert "not distinguishable" in to_page(again).decode() and {each.winner for each in rankings(again)} > {None}
    quick = needs(record)["<quick> (emulator)"]
    assert quick["peak memory, MiB"] == 64 and quick["cold start to first token, ms"] == 2500
    assert quick["between tokens / bound"] > 1


def test_energy_and_cost_are_in_the_tables_and_where_they_come_from_at_the_top(record):
    page, text = to_page(record).decode(), to_markdown(record)
    offline = next(point for point in record["points"] if point["scenario"] == "offline")
    row, tokens = offline["rows"][0], sum(offline["rows"][0]["figures"]["output_tokens_per_second"]) / 5
    made = row["summary"]["output_tokens"] / 5
    assert row["figures"]["joules_per_token"] == [200 / made] * 5
    assert (row["figures"]["cpu_watts"], row["figures"]["gpu_watts"]) == ([15.0] * 5, [35.0] * 5)
    quick = needs(record)["<quick> (emulator)"]
    assert quick["J/token"] == 200 / made
    assert quick["cost of 1M tokens"] == pytest.approx(1.8 / 3600 / tokens * 1e6)
    alone = recommendations(record)[0]
    assert alone.figures["J/token"] == record["points"][2]["rows"][0]["figures"]["joules_per_token"][0]
    for head in ("J/token", "CPU, W", "GPU, W", "GPU busy, %", "GPU memory, MiB", "cost of 1M tokens"):
        assert f"<th>{head}</th>" in page and f"| {head} |" in text
    assert "| 75.0 | 3,072 |" in text
    assert "the idle machine drew 10 W (processor), which is included" in page and "GPU 0, driver 570.1." in page
    assert "Cost is at a price of 1.8 an hour." in page
    assert "Energy and power are not measured" in to_page(record | {"energy": None}).decode()


def test_every_latency_has_its_interval_on_the_page(record):
    page = to_page(record).decode()
    # Six points with clients' latencies, and none where nobody is a client.
    assert page.count("Every latency with its interval") == 6
    assert "between tokens" in page and re.search(r"<td>[\d.]+ \([\d.]+ to [\d.]+\)</td>", page)


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
def test_a_phone_shows_it_without_sideways_scrolling(record, tmp_path):
    path = tmp_path / "r.html"
    path.write_bytes(to_page(record))
    with browser(tmp_path / "profile") as chromium:
        for dark in (False, True):
            chromium.screen(390, 800, dark)
            chromium.open(f"file://{path}")
            assert chromium.run("document.documentElement.scrollWidth") <= 390
        assert chromium.requested().count(f"file://{path}") == len(chromium.requested()) == 2
        assert chromium.complaints() == []
        # Every letter of a chart is at least 8 pixels high.
        sizes = chromium.run(
            "Math.min(...[...document.querySelectorAll('figure svg text')].filter(t => t.getClientRects().length)"
            ".map(t => t.getBoundingClientRect().height))"
        )
        assert sizes >= 8
