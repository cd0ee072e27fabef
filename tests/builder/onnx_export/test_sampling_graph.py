"""The graph of the choice and the host agree: a row that the graph calls exact has the host's token, draw by draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.onnx_export.sampling_graph import sampling_model
from serving.sampling import sampler

Row = dict[str, Any]
_SESSIONS: dict[int, Any] = {}


def session(vocab_size: int) -> Any:
    if vocab_size not in _SESSIONS:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        model = sampling_model(vocab_size).SerializeToString()
        _SESSIONS[vocab_size] = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return _SESSIONS[vocab_size]


def no_edits(rows: int) -> Row:
    edits = {"edit_ids": np.zeros((rows, 1), np.int64), "edit_repetition": np.ones((rows, 1), np.float32)}
    return edits | {name: np.zeros((rows, 1), np.float32) for name in ("edit_bias", "edit_penalty")}


def in_graph(logits: Any, parameters: Row, draw: Any, candidates: int, edits: Row | None = None) -> Row:
    feeds = {
        "logits": logits[:, None],
        "draw": np.asarray(draw, np.float32),
        "top_k": np.asarray(parameters["top_k"], np.int64),
        "candidates": np.array([candidates], np.int64),
        **{name: np.asarray(parameters[name], np.float32) for name in ("temperature", "top_p", "min_p")},
        **(edits or no_edits(len(logits))),
    }
    running = session(logits.shape[1])
    return dict(zip([each.name for each in running.get_outputs()], running.run(None, feeds), strict=True))


def on_host(logits: Any, parameters: Row, draw: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The host's tokens for given random numbers."""
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "uniform", lambda seed, step: np.asarray(draw, np.float32))
        return sampler.sample_tokens(logits, **parameters, seed=0, step=0)


def rows_of_parameters(random: np.random.Generator, rows: int, vocab_size: int) -> Row:
    return {
        "temperature": random.choice([0.0, 1e-30, 0.1, 0.7, 1.0, 1.3, 1000.0], rows).astype(np.float32),
        "top_k": random.choice([0, 0, 1, 2, 7, vocab_size - 1, vocab_size, 2**31 - 1], rows),
        "top_p": random.choice([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0, 1.0], rows).astype(np.float32),
        "min_p": random.choice([0.0, 0.0, 1e-3, 0.1, 0.5, 1.0], rows).astype(np.float32),
    }


@pytest.mark.parametrize("kind", ["smooth", "ties", "equal"])
@pytest.mark.parametrize(("vocab_size", "count"), [(2, 8), (31, 8), (300, 3)])
def test_draws_agree(vocab_size: int, count: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """171,000 draws over all kinds; a flag is rare where all tokens are candidates and nothing lies on a border."""
    random = np.random.default_rng(vocab_size)
    flagged = 0
    for number in range(count):
        logits = 3 * random.standard_normal((3000, vocab_size)).astype(np.float32)
        logits = {"smooth": logits, "ties": np.round(logits), "equal": np.zeros_like(logits)}[kind]
        parameters = rows_of_parameters(random, len(logits), vocab_size)
        draw = sampler.uniform(random.integers(0, 2**63, len(logits)), number)
        wanted = on_host(logits, parameters, draw, monkeypatch)
        for candidates in {vocab_size, min(vocab_size, 5)}:
            outputs = in_graph(logits, parameters, draw, candidates)
            exact, tokens = outputs["exact"], outputs["token"][:, 0]
            wrong = np.flatnonzero(exact & (tokens != wanted))
            assert not wrong.size, (wrong[:3], {key: value[wrong[:3]] for key, value in parameters.items()})
            greedy = (parameters["temperature"] == 0) | (parameters["top_k"] == 1)
            assert exact[greedy].all()
            if candidates == vocab_size:
                flagged += int((~exact).sum())
            else:
                # Few candidates decide some rows whose kept tokens go on behind them.
                assert (exact & ~greedy).any()
    if kind == "smooth":
        assert flagged < 3e-3 * 3000 * count, flagged


def test_draws_beside_every_border_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random numbers within a few of their own steps of a border, where only the last bits of a sum decide."""
    random = np.random.default_rng(3)
    logits = 2 * random.standard_normal((40, 31)).astype(np.float32)
    order = -np.sort(-logits, axis=1)
    sums = np.cumsum(np.exp(order - order[:, :1]), axis=1, dtype=np.float64)
    steps = np.arange(-4, 5)
    draws = (np.floor(sums / sums[:, -1:] * 2**24)[:, :, None] + steps) * 2.0**-24
    draws = np.clip(draws, 0, 1 - 2.0**-24).astype(np.float32)
    flat = draws.reshape(-1)
    rows = np.repeat(logits, 31 * len(steps), 0)
    parameters = {name: np.full(len(rows), value) for name, value in DEFAULTS.items()}
    wanted = on_host(rows, parameters, flat, monkeypatch)
    outputs = in_graph(rows, parameters, flat, 31)
    assert (outputs["token"][:, 0] == wanted)[outputs["exact"]].all()
    # So near a border nothing may be called certain.
    assert outputs["exact"].mean() < 0.1
    far = in_graph(rows, parameters, np.clip(flat - np.float32(1e-4), 0, 1), 31)
    assert far["exact"].mean() > 0.9


DEFAULTS: Row = {"temperature": np.float32(1), "top_k": 0, "top_p": np.float32(1), "min_p": np.float32(0)}
LOGITS = st.lists(st.sampled_from([-3.0, 0.0, 0.5, 1.0, 7.0]) | st.floats(-50, 50, width=32), min_size=8, max_size=8)


@given(
    LOGITS,
    st.sampled_from([0.0, 1e-30, 0.3, 1.0, 40.0, 1000.0]),
    st.integers(0, 9),
    st.floats(2.0**-7, 1.0, width=32),
    st.sampled_from([0.0, 0.25, 1.0]) | st.floats(0.0, 1.0, width=32),
    st.integers(0, 2**24 - 1),
    st.integers(1, 8),
)
@settings(derandomize=True, deadline=None, max_examples=400)
def test_any_row_agrees(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, draw: int, candidates: int
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        row = np.array([logits], np.float32)
        values = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        parameters = {key: np.array([value]) for key, value in values.items()}
        uniform = np.array([draw * 2.0**-24], np.float32)
        outputs = in_graph(row, parameters, uniform, candidates)
        if outputs["exact"][0]:
            assert outputs["token"][0, 0] == on_host(row, parameters, uniform, monkeypatch)[0]


@pytest.mark.parametrize("bad", [[np.nan, 1.0], [1.0, np.nan], [np.inf, 0.0], [-np.inf, -np.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_not_a_number_is_left_to_the_host(bad: list[float], temperature: float) -> None:
    parameters = {name: np.array([value]) for name, value in (DEFAULTS | {"temperature": temperature}).items()}
    outputs = in_graph(np.array([bad], np.float32), parameters, [0.3], 2)
    assert not outputs["exact"][0]
    hidden = in_graph(np.array([[-np.inf, 1.0]], np.float32), parameters, [0.3], 2)
    assert hidden["exact"][0] and hidden["token"][0, 0] == 1


def test_a_top_k_beyond_the_candidates_is_left_to_the_host() -> None:
    parameters = {name: np.array([value]) for name, value in (DEFAULTS | {"top_k": 6}).items()}
    logits = np.arange(31, dtype=np.float32)[None]
    assert not in_graph(logits, parameters, [0.1], 5)["exact"][0]
    assert in_graph(logits, parameters, [0.1], 6)["exact"][0]


def test_candidates_and_their_normaliser() -> None:
    random = np.random.default_rng(1)
    logits = random.standard_normal((3, 300)).astype(np.float32)
    parameters = {name: np.full(3, value) for name, value in DEFAULTS.items()}
    parameters["temperature"] = np.array([0, 1, 0.7], np.float32)
    outputs = in_graph(logits, parameters, [0.5] * 3, 16)
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :16]
    np.testing.assert_array_equal(outputs["candidate_ids"], ids)
    np.testing.assert_array_equal(outputs["candidate_logits"], np.take_along_axis(logits, ids, 1))
    scaled = logits.astype(np.float64) / np.array([1, 1, 0.7])[:, None]
    wanted = scaled - np.log(np.exp(scaled).sum(1, keepdims=True))
    ours = outputs["candidate_logits"] - outputs["candidate_logits"][:, :1]
    ours = ours / np.array([1, 1, 0.7])[:, None] - outputs["normaliser"][:, None]
    assert np.abs(ours - np.take_along_axis(wanted, ids, 1)).max() < 1e-5


def test_edits_are_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    from serving.sampling import SamplingParams
    from serving.sampling.penalties import PenaltyState

    random = np.random.default_rng(2)
    prompts = [random.integers(0, 300, length).tolist() for length in (1, 9, 30)]
    params = [
        SamplingParams(repetition_penalty=1.3, logit_bias={5: 4.0, 299: -100.0}),  # type: ignore[arg-type]
        SamplingParams(presence_penalty=1.5, frequency_penalty=-0.5),
        SamplingParams(),
    ]
    history = PenaltyState(prompts, params)
    parameters = {name: np.full(3, value) for name, value in DEFAULTS.items()}
    for number in range(60):
        logits = 3 * random.standard_normal((3, 300)).astype(np.float32)
        edits = history.logits_processor
        names = ("ids", "bias", "repetition", "penalty")
        draw = random.random(3, np.float32)
        outputs = in_graph(logits, parameters, draw, 300, {f"edit_{name}": getattr(edits, name) for name in names})
        edited = edits.apply(logits, np.arange(3))
        order = np.argsort(-edited, axis=1, kind="stable")
        np.testing.assert_array_equal(outputs["candidate_logits"], np.take_along_axis(edited, order, 1))
        wanted = on_host(edited, parameters, draw, monkeypatch)
        assert (outputs["token"][:, 0] == wanted)[outputs["exact"]].all()
        assert (edited[2] == logits[2]).all() and (number == 0) == (edited[1] == logits[1]).all()
        for row in range(3):
            history.add(row, int(wanted[row]))
