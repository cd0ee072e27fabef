"""Drawing among the likeliest: the whole vocabulary's token or none, and seldom none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.sampling import candidate_sampling
from serving.sampling.candidate_sampling import descending, sample_row

VALUES = st.sampled_from([-3.0, 0.0, -0.0, 0.5, 1.0, 7.0, -np.inf]) | st.floats(-20, 20, width=32)


def by_sorting_all(line: np.ndarray, temperature: float, top_p: float, min_p: float, draw: float) -> int:
    """The definition in `serving.sampling.sample_tokens`, without top-k."""
    order = np.lexsort((np.arange(len(line)), -line.astype(np.float64)))
    with np.errstate(under="ignore", over="ignore"):
        weights = np.exp((line - line.max()) / np.float32(temperature))[order]
    sums = np.cumsum(weights, dtype=np.float64)
    kept = 1 + int(np.count_nonzero(sums[:-1] < np.float64(np.float32(top_p)) * sums[-1]))
    kept = min(kept, int(np.count_nonzero(weights >= np.float32(min_p))))
    return int(order[np.flatnonzero(sums[:kept] > np.float64(np.float32(draw)) * sums[kept - 1])[0]])


def drawn(line: np.ndarray, temperature: float, top_p: float, min_p: float, draw: float) -> int:
    single = (np.float32(each) for each in (temperature, top_p, min_p, draw))
    temperature_, top_p_, min_p_, draw_ = single
    return sample_row(line, temperature_, 0, top_p_, min_p_, draw_)


@given(
    st.lists(VALUES, min_size=5, max_size=12).filter(lambda each: max(each) > -np.inf),
    st.sampled_from([0.01, 0.7, 1.0, 30.0]),
    st.sampled_from([0.25, 0.5, 0.9, 1.0]) | st.floats(0.01, 1.0),
    st.sampled_from([0.0, 0.0, 0.1, 1.0]) | st.floats(0, 1),
    st.sampled_from([0.0, 0.25, 0.5, 0.75, 1 - 2.0**-24]) | st.floats(0, 1, exclude_max=True, width=32),
)
@settings(derandomize=True, deadline=None, max_examples=400)
def test_a_short_search_finds_what_sorting_all_finds(
    logits: list[float], temperature: float, top_p: float, min_p: float, draw: float
) -> None:
    line = np.array(logits, np.float32)
    expected = by_sorting_all(line, temperature, top_p, min_p, draw)
    for few in (2, 3, 4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(candidate_sampling, "FEW_CANDIDATES", few)
            assert drawn(line, temperature, top_p, min_p, draw) == expected


@pytest.mark.parametrize(("spread", "top_p", "min_p", "sorts"), [
    (4.0, 1.0, 0.0, False),
    (4.0, 0.9, 0.0, False),
    (1.0, 1.0, 0.1, False),
    (0.0, 1.0, 0.0, True),
])  # fmt: skip
def test_the_vocabulary_is_sorted_only_where_it_must_be(
    monkeypatch: pytest.MonkeyPatch, spread: float, top_p: float, min_p: float, sorts: bool
) -> None:
    random = np.random.default_rng(5)
    sorted_sizes = []

    def watched(line: np.ndarray, ids: np.ndarray) -> np.ndarray:
        sorted_sizes.append(len(ids))
        return descending(line, ids)

    monkeypatch.setattr(candidate_sampling, "descending", watched)
    for _ in range(50):
        line = (random.standard_normal(20_000) * spread).astype(np.float32)
        draw = float(random.random())
        assert drawn(line, 1.0, top_p, min_p, draw) == by_sorting_all(line, 1.0, top_p, min_p, draw)
    whole = sum(size == 20_000 for size in sorted_sizes)
    assert whole >= 45 if sorts else whole <= 10


def test_descending_is_a_stable_order_of_bits() -> None:
    line = np.array([0.0, -0.0, 3.0, -np.inf, 3.0, np.inf, -1e-45, 1e-45], np.float32)
    assert descending(line, np.arange(8)).tolist() == [5, 2, 4, 7, 0, 1, 6, 3]
