"""Sampling: the distributions are the ones asked for, and a row never depends on its neighbours."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from serving.errors import BundleError, InputError
from serving.sampling import SamplingParams, sample_tokens, uniform
from serving.sampling.sampler import greedy_tokens

# The 99.99 % point of chi-square is below this for 1 to 255 degrees of freedom (Wilson and Hilferty, 1931).
QUANTILE = 3.719


def chi_square_limit(freedom: int) -> float:
    return freedom * (1 - 2 / (9 * freedom) + QUANTILE * math.sqrt(2 / (9 * freedom))) ** 3


def one(logits: Any, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0, step: int = 0) -> int:
    row = np.asarray([logits], np.float32)
    return int(sample_tokens(row, [temperature], [top_k], [top_p], [seed], [step])[0])


def many(logits: Any, count: int, **options: Any) -> NDArray[np.int64]:
    """Chosen token of one row of logits for the seeds 0 to count - 1."""
    rows = np.tile(np.asarray(logits, np.float32), (count, 1))
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "step": 0, **options}
    return sample_tokens(rows, seed=np.arange(count), **settings)


def plain_uniform(seed: int, step: int) -> float:
    """The definition in Python's unbounded integers."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    mixed = mix(seed % 2**32 ^ mix(seed // 2**32 % 2**32 ^ mix((step + 0x9E3779B9) % 2**32)))
    return (mixed >> 8) * 2.0**-24


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**31 - 1))
@settings(derandomize=True)
def test_uniform_is_its_definition(seed: int, step: int) -> None:
    assert float(uniform(seed, step)) == plain_uniform(seed, step)


def test_uniform_is_pinned_broadcasts_and_stays_below_one() -> None:
    values = uniform(np.array([[0], [1], [2**63 - 1]]), np.array([0, 1]))
    assert values.shape == (3, 2) and values.dtype == np.float32
    assert values.tolist() == [[plain_uniform(seed, step) for step in (0, 1)] for seed in (0, 1, 2**63 - 1)]
    assert len(set(values.ravel().tolist())) == 6


@pytest.mark.parametrize("axis", ["seed", "step", "high half of seed"])
def test_uniform_is_uniform(axis: str) -> None:
    counter = np.arange(200_000)
    axes: dict[str, tuple[Any, Any]] = {
        "seed": (counter, 3),
        "step": (7, counter),
        "high half of seed": (counter << 32, 3),
    }
    values = uniform(*axes[axis])
    assert values.min() >= 0 and values.max() < 1
    counts = np.histogram(values, bins=64, range=(0, 1))[0]
    expected = len(counter) / 64
    assert ((counts - expected) ** 2 / expected).sum() < chi_square_limit(63)
    # Neighbouring counters are independent: the correlation's standard deviation is 1 / sqrt(n).
    correlation = np.corrcoef(values[:-1], values[1:])[0, 1]
    assert abs(correlation) < 4 / math.sqrt(len(counter))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 5},
        {"top_p": 0.8},
        {"top_k": 9, "top_p": 0.6},
        {"min_p": 0.3},
        {"temperature": 2.0, "top_p": 0.9, "min_p": 0.2},
    ],
)
def test_choices_follow_the_probabilities(options: dict[str, Any]) -> None:
    logits = np.array([1.0, 3.0, 0.5, 2.0, 2.0, -1.0, 2.9, 0.0, -4.0, 1.5, 1.5, 1.5], np.float32)
    order = np.argsort(-logits, kind="stable")[: options.get("top_k") or None]
    wanted = np.exp(logits[order].astype(np.float64) / options.get("temperature", 1.0))
    wanted /= wanted.sum()
    kept = np.cumsum(wanted) - wanted < options.get("top_p", 1.0)
    kept &= wanted >= options.get("min_p", 0.0) * wanted[0]
    wanted = wanted[kept] / wanted[kept].sum()
    count = 40_000
    chosen = many(logits, count, **options)
    assert set(chosen.tolist()) <= set(order[kept].tolist())
    counts = np.bincount(chosen, minlength=len(logits))[order[kept]]
    assert ((counts - count * wanted) ** 2 / (count * wanted)).sum() < chi_square_limit(len(wanted) - 1)


def test_edges() -> None:
    logits = [1.0, 5.0, 5.0, -2.0]
    assert one(logits, temperature=0) == 1
    assert one(logits, temperature=1e-50) == 1  # 0 in float32.
    assert {one(logits, top_k=1, seed=seed) for seed in range(50)} == {1}
    assert {one(logits, top_p=1e-9, seed=seed) for seed in range(50)} == {1}
    assert {one(logits, top_k=2, seed=seed) for seed in range(50)} == {1, 2}
    assert {one(logits, temperature=1e-30, seed=seed) for seed in range(50)} == {1, 2}
    assert set(many(logits, 400, temperature=1000.0).tolist()) == {0, 1, 2, 3}
    assert set(many(logits, 400, temperature=1000.0, top_k=99).tolist()) == {0, 1, 2, 3}
    # The mass before the second of two equals is exactly half, which is not below half.
    assert set(many([0.0, 0.0], 50, top_p=0.5).tolist()) == {0}
    assert set(many([-0.0, 0.0, -0.0], 50, top_k=2).tolist()) == {0, 1}
    hidden = [-np.inf, -np.inf, 0.5, -np.inf]
    assert set(many(hidden, 200, temperature=50.0).tolist()) == {2}
    assert set(many(hidden, 200, top_k=3, top_p=0.5).tolist()) == {2}
    assert set(many([1.0, 1.0, 0.9], 200, min_p=1.0).tolist()) == {0, 1}
    assert set(many([3.4e38, -3.4e38], 200, temperature=1000.0).tolist()) == {0}


@pytest.mark.parametrize("logits", [[np.nan, 1.0], [1.0, np.nan], [np.inf, 0.0], [-np.inf, -np.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers(logits: list[float], temperature: float) -> None:
    with pytest.raises(BundleError, match="not a finite number, in row 0"):
        one(logits, temperature=temperature)


ROWS = st.lists(
    st.tuples(
        st.lists(
            st.sampled_from([-3.0, 0.0, 0.5, 0.5, 1.0, 7.0]) | st.floats(-50, 50, width=32), min_size=8, max_size=8
        ),
        st.sampled_from([0.0, 0.3, 1.0, 40.0]),
        st.integers(0, 9),
        st.floats(0.01, 1.0),
        st.integers(0, 2**63 - 1),
        st.integers(0, 1000),
    ),
    min_size=1,
    max_size=5,
)


@given(ROWS)
@settings(derandomize=True, deadline=None)
def test_rows_are_independent(rows: list[tuple[list[float], float, int, float, int, int]]) -> None:
    logits, *rest = (np.array(column) for column in zip(*rows, strict=True))
    together = sample_tokens(logits.astype(np.float32), *rest)
    assert together.shape == (len(rows),) and together.dtype == np.int64
    assert together.tolist() == [one(*row) for row in rows]


@given(ROWS)
@settings(derandomize=True, deadline=None)
def test_choice_is_its_documented_order_of_operations(rows: list[tuple[Any, ...]]) -> None:
    for logits, temperature, top_k, top_p, seed, step in rows:
        values = np.array(logits, np.float32)
        order = sorted(range(len(values)), key=lambda index: (-values[index], index))[: top_k or None]
        if temperature == 0:
            expected = order[0]
        else:
            weights = [np.exp((values[i] - values[order[0]]) / np.float32(temperature)) for i in order]
            sums: list[float] = []
            for weight in weights:
                sums.append(float(weight) + (sums[-1] if sums else 0.0))
            cutoff = float(np.float32(top_p)) * sums[-1]
            kept = [index for index in range(len(order)) if index == 0 or sums[index - 1] < cutoff]
            target = float(uniform(seed, step)) * sums[kept[-1]]
            expected = order[next(index for index in kept if sums[index] > target)]
        assert one(logits, temperature, top_k, top_p, seed, step) == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2**31),
        ("max_new_tokens", 1.5),
        ("max_new_tokens", True),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", 1000.5),
        ("top_k", -1),
        ("top_k", 2.0),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1.5: 1.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: True}),
        ("logit_bias", ((1, 1.0), (1, 2.0))),
        ("logit_bias", 7),
        ("seed", -1),
        ("seed", 2**63),
        ("min_tokens", -1),
        ("min_tokens", 1.0),
        ("stop_token_ids", 7),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", (2**31,)),
        ("stop_token_ids", (1.0,)),
        ("stop_token_ids", (True,)),
        ("stop", "text"),
        ("stop", ("",)),
        ("stop", ("\ud800",)),
        ("stop", (1,)),
        ("ignore_eos", 1),
    ],
)
def test_params_name_the_field(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"^{field} ") as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_params_take_their_bounds() -> None:
    lowest = SamplingParams(1, 0, 0, 1e-9, 0, 0.01, -2, -2, ((0, -100),), 0, (), (0,), 0)
    top = 2**31 - 1
    highest = SamplingParams(top, 1000, top, 1, 1, 100, 2, 2, ((top, 100),), 2**63 - 1, (), (top,), top)
    assert lowest.end_ids(None) == {0} and highest.logit_bias == ((top, 100.0),)


def test_params_take_numpy_numbers() -> None:
    params = SamplingParams(max_new_tokens=np.int64(3), temperature=np.float32(0.5), stop=["a"])  # type: ignore[arg-type]
    assert (params.max_new_tokens, params.temperature, params.stop) == (3, 0.5, ("a",))
    assert type(params.max_new_tokens) is int and type(params.temperature) is float


def test_a_long_tail_is_not_lost_in_rounding() -> None:
    """A million tokens, each too unlikely to change a float32 sum, have 1/33 of the mass together."""
    logits = np.full((1, 2**20), np.log(2.0**-25), np.float32)
    logits[:, 0] = 0
    # The tail's share is 1 in 33, the standard deviation of its count in 99 draws 1.7.
    chosen = [int(sample_tokens(logits, 1.0, 0, 1.0, seed, 0)[0]) for seed in range(99)]
    assert 0 < sum(token > 0 for token in chosen) < 10


def test_bias_is_taken_as_mapping_or_pairs() -> None:
    assert SamplingParams(logit_bias={7: 1, 3: -2.5}).logit_bias == ((3, -2.5), (7, 1.0))  # type: ignore[arg-type]
    assert SamplingParams(logit_bias=[(np.int64(7), np.float32(1))]).logit_bias == ((7, 1.0),)  # type: ignore[arg-type]


def test_greedy_tokens_are_those_of_the_sampler_and_so_is_their_error() -> None:
    lines = np.random.default_rng(2).standard_normal((7, 50)).astype(np.float32)
    lines[3, [4, 9]] = 20
    assert greedy_tokens(lines) == sample_tokens(lines, 0.0, 0, 1.0, 0, 0).tolist()
    lines[5] = np.nan
    with pytest.raises(BundleError, match="not a finite number, in row 5"):
        greedy_tokens(lines)
