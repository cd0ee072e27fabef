"""A single prompt that decodes speculatively gets the tokens of single-token steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import serving
from builder.verification.speculation_parity import compare_speculation
from serving.backends.base import FloatArray, IntArray
from serving.backends.onnx import OnnxBackend
from serving.backends.verify_steps import FP32_STEP
from serving.bundle import Bundle, open_bundle
from serving.engine.api import GenerationRequest
from serving.engine.config import EngineConfig
from serving.engine.engine import open_engine
from serving.errors import InputError, ParityError
from serving.generation import generate, stream, token_selection
from serving.sampling import SamplingParams
from tests.closed_form import ClosedFormBackend, State

END = 256
LETTERS = 11
TOLERANCE = 1e-3
SETTINGS = [
    SamplingParams(ignore_eos=True),
    SamplingParams(temperature=0.8, seed=3, ignore_eos=True),
    SamplingParams(temperature=0.6, top_p=0.9, frequency_penalty=0.3, repetition_penalty=1.1, ignore_eos=True),
]
REPEATED = [40 + place % 7 for place in range(14)]


class RepetitiveBackend(ClosedFormBackend):
    """Texts that repeat with surprises, and near ties that the noise after a verify step turns round."""

    draft_table = None
    pacing: Any = None

    def __init__(self, tolerance: float | None) -> None:
        super().__init__(257, 200)
        self.verify_step = None if tolerance is None else replace(FP32_STEP, tolerance=tolerance)
        self.inexact = self.longest = self.verified = 0

    def verify(self, state: State, tokens: IntArray) -> FloatArray:
        assert len(tokens) > 1 and len(state.rows) == 1
        self.verified += 1
        self.inexact = min(self.inexact, len(state.rows[0])) or len(state.rows[0])
        return np.concatenate([self.decode(state, tokens[place : place + 1]) for place in range(len(tokens))])

    def rewind(self, state: State, length: int) -> None:
        assert length <= len(state.rows[0])
        self.inexact = 0 if length <= self.inexact else self.inexact
        del state.rows[0][length:]

    def prefill(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[State, FloatArray]:
        self.inexact = 0
        return super().prefill(prompts, capacity)

    def _logits(self, state: State) -> FloatArray:
        return np.stack([self._line(row) for row in state.rows])

    def _line(self, row: list[int]) -> FloatArray:
        length, last = len(row), row[-1] % LETTERS
        likely = (last * 5 + 3) % LETTERS if length % 23 == 7 else (last + 1) % LETTERS
        line = np.full(257, -5, np.float32)
        line[:LETTERS] = -((np.arange(LETTERS) - likely) % LETTERS) / 2
        if length % 9 == 0:
            line[(likely + 1) % LETTERS] = -TOLERANCE / 8
        if self.inexact and self.verify_step is not None and self.verify_step.tolerance:
            line += np.sin(np.arange(257) * 7.0 + length).astype(np.float32) * np.float32(TOLERANCE * 0.99)
        return line


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All SpeculativeSteps that are opened from here on."""
    made: list[Any] = []
    original = token_selection.SpeculativeSteps

    def note(*arguments: Any) -> Any:
        made.append(original(*arguments))
        return made[-1]

    monkeypatch.setattr(token_selection, "SpeculativeSteps", note)
    return made


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("tolerance", [0.0, TOLERANCE])
@pytest.mark.parametrize("params", SETTINGS)
def test_tokens_equal_plain_decoding(params: SamplingParams, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = counted(monkeypatch)
    prompt = [place % LETTERS for place in range(24)]
    for count in (1, 2, 3, 60, 176):
        each = SamplingParams(**{**vars(params), "max_new_tokens": count})
        ours = generate(RepetitiveBackend(tolerance), [prompt], each, END)
        assert ours == generate(RepetitiveBackend(None), [prompt], each, END)
    assert sum(each.accepted for each in steps) > 5
    if tolerance and not params.temperature:
        assert sum(each.replayed for each in steps) > 0


@pytest.mark.usefixtures("eager")
def test_without_replays_the_noise_does_change_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.generation.speculative_decode.is_certain", lambda *_: True)
    params = SamplingParams(max_new_tokens=150, ignore_eos=True)
    prompt = [place % LETTERS for place in range(24)]
    ours = generate(RepetitiveBackend(TOLERANCE), [prompt], params, END)
    assert ours != generate(RepetitiveBackend(None), [prompt], params, END)


@pytest.mark.usefixtures("eager")
def test_logits_and_stops_come_with_every_token() -> None:
    prompt, params = [place % LETTERS for place in range(24)], SamplingParams(max_new_tokens=40, ignore_eos=True)
    seen: dict[bool, list[Any]] = {True: [], False: []}
    for speculates in (True, False):
        backend = RepetitiveBackend(0.0 if speculates else None)

        def note(row: int, token: int, logits: FloatArray, into: list[Any] = seen[speculates]) -> None:
            into.append((token, logits.tolist()))

        tokens = list(stream(backend, prompt, params, END, note))
        assert len(tokens) == 40
        (stopped,) = generate(backend, [prompt], params, END, lambda row, token: token == 5)
        seen[speculates].append(stopped)
    assert seen[True] == seen[False]


@pytest.fixture(scope="module")
def bundle(real_bundle: Path) -> Bundle:
    return open_bundle(real_bundle)


@pytest.mark.usefixtures("eager")
def test_a_real_graph(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = counted(monkeypatch)
    plain, ours = OnnxBackend(bundle), OnnxBackend(bundle, speculation=True)
    assert plain.verify_step is None and ours.verify_step is not None
    for seed in range(8):
        for params in SETTINGS:
            each = SamplingParams(**{**vars(params), "max_new_tokens": 40, "seed": seed})
            prompt = REPEATED if seed % 2 else [seed, 250 - seed, 7]
            assert generate(ours, [prompt], each, END) == generate(plain, [prompt], each, END)
    assert sum(each.accepted for each in steps) > 5


@pytest.mark.usefixtures("eager")
def test_two_streams_take_turns(bundle: Bundle) -> None:
    """Each has its own KV cache and its own logits."""
    backend, params = OnnxBackend(bundle, speculation=True), SamplingParams(max_new_tokens=30, ignore_eos=True)
    prompts = [REPEATED, REPEATED[3:]]
    alone = [list(stream(backend, prompt, params, END)) for prompt in prompts]
    together = list(zip(*(stream(backend, prompt, params, END) for prompt in prompts), strict=True))
    assert [list(row) for row in zip(*together, strict=True)] == alone


@pytest.mark.usefixtures("eager")
def test_a_real_engine(bundle: Bundle) -> None:
    """Alone, and with others that join in the middle."""
    results = []
    for speculation in ("on", "off"):
        engine = open_engine(bundle, config=EngineConfig(slots=3, speculation=speculation))  # type: ignore[arg-type]
        try:
            results.append(_texts(engine))
            stats = engine.stats()
        finally:
            engine.close()
        assert (stats.accepted_prompt_tokens > 0) == (speculation == "on")
    assert results[0] == results[1]


def _texts(engine: Any) -> list[list[int]]:
    import threading

    tokens: list[list[int]] = []

    def submit(prompt: list[int], params: SamplingParams) -> threading.Event:
        mine: list[int] = []
        ended = threading.Event()
        tokens.append(mine)

        def listen(event: Any) -> None:
            if hasattr(event, "token_id"):
                mine.append(event.token_id)
            elif hasattr(event, "reason"):
                ended.set()

        engine.submit(GenerationRequest(tuple(prompt), params), listen)
        return ended

    for params in SETTINGS:
        each = SamplingParams(**{**vars(params), "max_new_tokens": 33})
        assert submit(REPEATED, each).wait(60)
        together = [submit(REPEATED[place:], each) for place in range(3)]
        assert all(event.wait(60) for event in together)
    return tokens


def test_the_portable_graph_decodes_plainly(bundle: Bundle) -> None:
    assert OnnxBackend(bundle, "onnx/portable", speculation=True).verify_step is None


def test_the_setting(real_bundle: Path) -> None:
    on, off = (serving.load(real_bundle, speculation=mode) for mode in ("on", "off"))  # type: ignore[arg-type]
    assert on.generate("abcabcabc", max_new_tokens=20) == off.generate("abcabcabc", max_new_tokens=20)
    with pytest.raises(InputError, match="speculation is 'fast'"):
        serving.load(real_bundle, speculation="fast")  # type: ignore[arg-type]


def test_by_itself_it_needs_proof_and_no_second_session(bundle: Bundle) -> None:
    """What `serve` does where nothing is asked for."""
    proven = replace(bundle, manifest=replace(bundle.manifest, parity={"speculation": {"verified": {"of": 1}}}))
    engines = [open_engine(each, config=EngineConfig(slots=1)) for each in (bundle, proven)]
    for engine in engines:
        engine.close()
    assert [engine._backend.verify_step for engine in engines] == [None, FP32_STEP]  # type: ignore[attr-defined]


def test_the_certificate_compares_every_token_and_refuses_another(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[5, 9, 200], [7], REPEATED]
    rows = generate(OnnxBackend(bundle), prompts, SamplingParams(max_new_tokens=20, ignore_eos=True), END)
    candidates = np.array([row.token_ids for row in rows])
    record = compare_speculation(bundle, "ort/fp32", prompts, candidates, 2)
    assert record is not None and record["deviation"] <= record["tolerance"]
    assert record["verified"]["of"] == 57 and record["verified"]["equal"] == record["verified"]["certain"] >= 50
    assert all(each == {"equal": 40, "of": 40} for each in record["generated"].values())
    assert compare_speculation(bundle, "onnx/portable", prompts, candidates, 2) is None
    wrong = candidates.copy()
    wrong[1, 4] = (wrong[1, 4] + 1) % 257
    with pytest.raises(ParityError, match="certain tokens"):
        compare_speculation(bundle, "ort/fp32", prompts, wrong, 0)
    monkeypatch.setattr("serving.backends.onnx.FP32_STEP", replace(FP32_STEP, tolerance=1e-12))
    with pytest.raises(ParityError, match="are off by"):
        compare_speculation(bundle, "ort/fp32", prompts, candidates, 2)
