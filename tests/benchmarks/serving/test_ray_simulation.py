"""The simulation of a Ray cluster against closed forms: queues, steps, routing and conservation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.serving.ray_scaling import split_costs
from benchmarks.serving.ray_simulation import Machine, Simulation, Traffic, capacity, main, sweep

MACHINE = Machine(
    step=0.004,
    step_per_sequence=0.0005,
    prefill_per_token=0.0001,
    ingress_per_request=0.0005,
    ingress_per_token=0.00005,
)
FREE = replace(MACHINE, ingress_per_request=0.0, ingress_per_token=0.0)


def test_one_request_takes_its_steps() -> None:
    traffic = Traffic(requests=1, own=64, new=10, clients=1)
    found = Simulation(FREE, traffic, replicas=1).run()
    # One step prefills and gives the first token; nine more decode one sequence.
    assert found["time_to_first_token_s"]["p50"] == pytest.approx(0.004 + 64 * 0.0001)
    assert found["latency_s"]["p50"] == pytest.approx(0.004 + 64 * 0.0001 + 9 * 0.0045)


def test_a_full_batch_has_the_throughput_of_its_steps() -> None:
    traffic = Traffic(requests=640, own=1, new=100, clients=16)
    found = Simulation(FREE, traffic, replicas=1).run()
    assert found["tokens_per_second"] == pytest.approx(16 / (0.004 + 16 * 0.0005), rel=0.05)


def test_an_ingress_waits_as_pollaczek_and_khinchine_say() -> None:
    """M/D/1: the mean wait is rho * service / (2 * (1 - rho))."""
    service, rho = 0.001, 0.7
    machine = replace(FREE, step=0.0, step_per_sequence=0.0, prefill_per_token=0.0, ingress_per_request=service)
    simulation = Simulation(machine, Traffic(requests=30_000, own=1, new=1, rate=rho / service), replicas=64, seed=1)
    found = simulation.run()
    waits = [each.routed - each.arrived - service for each in simulation.done]
    assert sum(waits) / len(waits) == pytest.approx(rho * service / (2 * (1 - rho)), rel=0.1)
    assert found["busiest_ingress"] == pytest.approx(rho, rel=0.03)


@pytest.mark.parametrize("by_prefix", [True, False])
def test_every_request_ends_once_and_nothing_is_left(by_prefix: bool) -> None:
    traffic = Traffic(requests=3000, shared=128, own=16, new=20, groups=50, rate=2000.0)
    simulation = Simulation(MACHINE, traffic, replicas=4, ingresses=3, by_prefix=by_prefix)
    assert simulation.run()["requests"] == 3000 == len({id(each) for each in simulation.done})
    assert all(each.in_flight == 0 and not each.busy for each in simulation._replicas.values())
    assert not any(simulation._waiting)
    assert all(0 <= each.arrived <= each.first for each in simulation.done)


def test_prefix_routing_finds_the_prefixes_that_random_routing_misses() -> None:
    traffic = Traffic(requests=6000, shared=256, own=32, new=16, groups=120, rate=400.0)
    by_prefix, at_random = (Simulation(MACHINE, traffic, replicas=20, by_prefix=each).run() for each in (True, False))
    assert by_prefix["cached_prefixes"] > 0.9 > 0.75 > at_random["cached_prefixes"]
    assert by_prefix["time_to_first_token_s"]["p50"] < at_random["time_to_first_token_s"]["p50"]


def test_cores_that_are_shared_bound_all_replicas_together() -> None:
    traffic = Traffic(requests=800, own=1, new=50, clients=32)
    machine = replace(FREE, cores=2)
    two, four = (Simulation(machine, traffic, replicas=count).run()["tokens_per_second"] for count in (2, 4))
    assert four < 1.2 * two


def test_what_a_request_costs_is_told_from_what_a_token_costs() -> None:
    rounds = [(requests, requests * tokens) for requests, tokens in ((100, 96), (400, 4), (250, 96))]
    costs = [(requests, tokens, 0.017 * requests + 0.0008 * tokens) for requests, tokens in rounds]
    assert split_costs(costs) == pytest.approx((0.017, 0.0008))
    # Rounds of one length do not tell them apart.
    alike = [(requests, 96.0 * requests, 0.1 * requests) for requests in (10, 20)]
    assert split_costs(alike) == pytest.approx((0.1, 0.0))


def test_past_its_capacity_the_ingress_is_the_limit() -> None:
    slow = replace(MACHINE, ingress_per_request=0.01)
    one, eight = sweep(slow, [60], 1, 0.7, True, 0.1)[0], sweep(slow, [60], 8, 0.7, True, 0.1)[0]
    passed_on = capacity(slow, Traffic(requests=1, shared=256, own=64, new=96))[1]
    assert one["requests_per_second"] > passed_on
    assert one["busiest_ingress"] > 0.95 and one["tokens_per_second"] < 1.05 * passed_on * 96
    assert eight["busiest_ingress"] < 0.9 and eight["tokens_per_second"] > 1.5 * one["tokens_per_second"]
    assert eight["latency_s"]["p99"] < one["latency_s"]["p99"]


def test_the_command_repeats_what_was_measured_and_is_the_same_each_time(tmp_path: Path) -> None:
    point = {"replicas": 1, "clients": 16, "prompt_tokens": 8, "new_tokens": 96, "tokens_per_second": 1300.0}
    record = {"machine": {name: getattr(MACHINE, name) for name in Machine.__dataclass_fields__}, "points": [point]}
    (tmp_path / "record.json").write_text(json.dumps(record))
    results = []
    for name in ("a.json", "b.json"):
        arguments = [str(tmp_path / "record.json"), "--replicas", "10", "--output", str(tmp_path / name)]
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.output
        assert "1300 tokens/s measured" in done.output and "one ingress passes on" in done.output
        results.append((tmp_path / name).read_bytes())
    assert results[0] == results[1]
    assert json.loads(results[0])["checked"][0]["ratio"] == pytest.approx(1, abs=0.1)
