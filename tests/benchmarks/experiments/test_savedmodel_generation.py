"""The comparison of whole generations: what is divided by what."""

from __future__ import annotations

from benchmarks.experiments.savedmodel_generation import summary


def test_a_token_is_the_difference_between_calls() -> None:
    times = {"gpt2-bundle": {1: [0.1, 0.1, 9.0], 5: [0.3, 0.3, 0.2]}, "other": {1: [0.2] * 3, 5: [1.0] * 3}}
    found = summary(times, 4)
    assert found["ms_call"] == {"gpt2-bundle": 300.0, "other": 1000.0}
    assert abs(found["ms_token"]["gpt2-bundle"] - 50) < 1e-9 and abs(found["ms_token"]["other"] - 200) < 1e-9
    assert abs(found["call_ratio"] - 10 / 3) < 1e-9 and abs(found["token_ratio"] - 4) < 1e-9
