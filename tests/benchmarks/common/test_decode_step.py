"""The decode benchmark on a closed-form backend: what it counts, and what it says when targets disagree."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

from benchmarks.common import decode_step, hardware
from benchmarks.common.decode_report import print_report
from benchmarks.common.decode_step import Target, cut_prompts, measure, step_bytes
from benchmarks.common.statistics import summarise
from serving.errors import InputError
from tests.closed_form import ClosedFormBackend, geometry


@pytest.fixture(autouse=True)
def small_probe(monkeypatch):
    """A probe that reads 1 MiB: these tests look at what is done with the figure, not at the figure."""
    monkeypatch.setattr(hardware, "_BYTES", 1 << 20)


class Disagreeing(ClosedFormBackend):
    """Gives another first token than the closed form."""

    def prefill(self, prompts, capacity):
        state, logits = super().prefill(prompts, capacity)
        return state, np.roll(logits, 1, axis=-1)


def run(*backends, batch_sizes=(1, 3), **settings):
    targets = [Target(f"target{index}", "fp32", backend) for index, backend in enumerate(backends)]
    settings = {"prompt_tokens": 4, "new_tokens": 5, "repeats": 2, "say": lambda line: None} | settings
    return measure(targets, geometry(), range(10), batch_sizes=batch_sizes, **settings)


def report(record):
    output = io.StringIO()
    print_report({"bundle": "b"} | record, Console(file=output, width=140))
    return output.getvalue()


def test_a_row_for_each_target_and_batch_with_every_sample_counted():
    record = run(ClosedFormBackend(), ClosedFormBackend())
    assert [(row["target"], row["batch_size"]) for row in record["rows"]] == [
        ("target0", 1), ("target1", 1), ("target0", 3), ("target1", 3),
    ]  # fmt: skip
    for row in record["rows"]:
        assert row["prefill_ms"]["samples"] == 2
        assert row["decode_ms"]["samples"] == 2 * 5
        assert row["decode_tokens_per_second"] == pytest.approx(row["batch_size"] / row["decode_ms"]["median"] * 1e3)
        assert row["floor_ms"] == pytest.approx(row["bytes_per_step"] / max(record["read_bandwidth_samples"]) * 1e3)
        assert row["decode_over_floor"] == pytest.approx(row["decode_ms"]["median"] / row["floor_ms"])
    json.dumps(record, allow_nan=False)


def test_equal_work_is_said_to_be_equal_and_other_work_is_called_out():
    assert "all targets gave the same tokens" in report(run(ClosedFormBackend(), ClosedFormBackend()))
    assert "TOKENS DIFFER" in report(run(ClosedFormBackend(), Disagreeing()))


def test_another_precision_may_give_other_tokens():
    record = run(ClosedFormBackend(), Disagreeing())
    for row in record["rows"]:
        row["precision"] = {"target0": "fp32", "target1": "int8"}[row["target"]]
    assert "all targets of one precision gave the same tokens" in report(record)


def test_a_prompt_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match="pass the context"):
        run(ClosedFormBackend(), prompt_tokens=geometry().n_positions)


def test_prompts_go_round_the_text():
    assert cut_prompts([5, 6, 7], 2, 4) == [[5, 6, 7, 5], [6, 7, 5, 6]]


def test_step_bytes_count_each_weight_once_and_the_cache_a_row():
    sizes = geometry()
    weights = (sizes.parameters - sizes.n_positions * sizes.n_embd) * 4
    assert step_bytes(sizes, "fp32", 7, 0) == weights
    assert step_bytes(sizes, "int8", 1, 0) == weights / 4
    cache = step_bytes(sizes, "fp32", 2, 10) - weights
    assert cache == 2 * 10 * sizes.n_layer * 2 * sizes.n_embd * 4
    # int8 and int4 keep keys and values in int8.
    assert step_bytes(sizes, "int8", 2, 10) - weights / 4 == step_bytes(sizes, "int4", 2, 10) - weights / 8 == cache / 4


def test_summary_of_known_samples():
    assert summarise([]) is None
    one = summarise([3.0])
    assert (one.median, one.low, one.high, one.samples) == (3.0, 3.0, 3.0, 1)
    values = np.random.default_rng(0).normal(10, 1, 400)
    summary = summarise(values)
    assert summary.median == pytest.approx(np.median(values))
    assert summary.low < summary.median < summary.high
    # The median's standard error of a normal sample is 1.2533 s / sqrt(n); the interval is about four of them wide.
    assert summary.high - summary.low == pytest.approx(3.92 * 1.2533 / np.sqrt(400), rel=0.35)
    # Of 101 ranks it reaches 1.96 sqrt(101) / 2 to either side of the middle one, as the sign test's does.
    ranks = summarise(range(101))
    assert (ranks.low, ranks.high) == pytest.approx((50 - 9.85, 50 + 9.85), abs=1)


def test_the_probe_keeps_its_samples():
    probe = hardware.BandwidthProbe()
    value = probe.sample(passes=1)
    assert value > 0
    assert probe.samples == [value]


def test_targets_take_turns(monkeypatch):
    order = []
    original = decode_step._run

    def spy(backend, *args):
        order.append(backend)
        return original(backend, *args)

    monkeypatch.setattr(decode_step, "_run", spy)
    first, second = ClosedFormBackend(), ClosedFormBackend()
    run(first, second, batch_sizes=(1,), repeats=3)
    assert order == [first, second] * 4


def test_a_model_that_fits_the_cache_is_said_to(monkeypatch):
    record = run(ClosedFormBackend())
    record["environment"]["last_level_cache_bytes"] = 1 << 40
    assert "memory is not their floor" in report(record)
    record["environment"]["last_level_cache_bytes"] = 1
    assert "memory is not their floor" not in report(record)
    record["environment"]["last_level_cache_bytes"] = None
    assert "memory is not their floor" not in report(record)
