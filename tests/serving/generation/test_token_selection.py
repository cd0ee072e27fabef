"""The choice on the device gives the host's tokens, and fetches logits only where it is not certain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.backends.base import SamplingRequest
from serving.backends.loader import load_backend
from serving.bundle import Bundle, open_bundle
from serving.errors import InputError, RuntimeMissingError
from serving.generation import Generation, generate, token_selection
from serving.generation.token_selection import DeviceSteps, HostSteps
from serving.sampling import SamplingParams, SamplingRows
from serving.sampling.penalties import PenaltyState

END = 256
PROMPTS = [[5, 9, 200], [7], list(range(30)), [80, 81]]


@pytest.fixture(scope="module")
def bundle(real_bundle: Path) -> Bundle:
    return open_bundle(real_bundle)


@pytest.fixture
def backend(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The optimized graph; `fetches` counts how often its logits were asked for."""
    loaded: Any = load_backend(bundle, "onnx")
    loaded.fetches = 0
    fetch = loaded.logits

    def counted(state: Any) -> Any:
        loaded.fetches += 1
        return fetch(state)

    monkeypatch.setattr(loaded, "logits", counted)
    return loaded


def both_ways(
    backend: Any, params: list[SamplingParams], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Generation], list[Generation], int]:
    """Generated on the host and on the device, and the fetches of the latter."""
    results = []
    for steps in (HostSteps, DeviceSteps):
        with monkeypatch.context() as patch:
            patch.setattr(
                "serving.generation.batch.open_steps",
                lambda backend, prompts, params, capacity, end, steps=steps: steps(
                    backend, token_selection.BatchSampler(prompts, params, end), prompts, capacity
                ),
            )
            backend.fetches = 0
            results.append(generate(backend, PROMPTS, params, END))
    return results[0], results[1], backend.fetches


MIXED = [
    SamplingParams(max_new_tokens=17, temperature=0.8, top_k=20, top_p=0.9, seed=3, ignore_eos=True),
    SamplingParams(max_new_tokens=5, repetition_penalty=1.4),
    SamplingParams(max_new_tokens=18, temperature=1.2, min_p=0.05, frequency_penalty=0.7, seed=9),
    SamplingParams(max_new_tokens=18, temperature=1.0, logit_bias=((3, 2.0), (END, -100.0)), seed=2**62),
]


def test_tokens_are_the_hosts_and_nothing_is_fetched(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    host, device, fetches = both_ways(backend, MIXED, monkeypatch)
    assert host == device and fetches == 0
    assert len({each.token_ids for each in host}) == 4


@pytest.mark.parametrize("candidates", [1, 4])
def test_rows_that_are_not_certain_are_chosen_here(
    candidates: int, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_selection, "MAX_CANDIDATES", candidates)
    host, device, fetches = both_ways(backend, MIXED, monkeypatch)
    assert host == device and fetches > 0


def test_the_device_chooses_where_it_pays(backend: Any, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [SamplingParams(temperature=each, top_k=k) for each, k in ((0, 0), (1, 40), (1, 0))]
    portable: Any = load_backend(bundle, "onnx", "onnx/portable")
    prompts = [[1], [2], [3]]
    assert isinstance(token_selection.open_steps(backend, prompts, params, 4), HostSteps)
    for each in (backend, portable):
        # As if it were elsewhere: what is run stays on the processor.
        monkeypatch.setattr(each, "device", "cuda")
    assert isinstance(token_selection.open_steps(backend, prompts, params, 4), DeviceSteps)
    assert isinstance(token_selection.open_steps(portable, prompts, params, 4), HostSteps)


def test_the_chosen_tokens_are_the_next_input_in_place(backend: Any) -> None:
    """What was chosen needs no upload: the buffer it lies in is the next step's input, until someone feeds another."""
    logits_processor = PenaltyState(PROMPTS, [SamplingParams()] * 4).logits_processor
    one, none = np.ones(4, np.float32), np.zeros(4, np.float32)
    request = SamplingRequest(SamplingRows(none, np.zeros(4, np.int64), one, none), none, logits_processor, 1)
    state = backend.open(PROMPTS, 40)
    tokens = backend.sample_tokens(state, request).tokens
    uploads: list[str] = []

    class Watched:
        def __init__(self, binding: Any) -> None:
            self.binding = binding

        def __getattr__(self, name: str) -> Any:
            return getattr(self.binding, name)

        def bind_cpu_input(self, name: str, value: Any) -> None:
            uploads.append(name)
            self.binding.bind_cpu_input(name, value)

    state.binding = Watched(state.binding)
    backend.advance(state, tokens)
    assert uploads == ["attention_mask", "position_ids"]
    plain, _ = backend.prefill(PROMPTS, 40)
    np.testing.assert_array_equal(backend.decode(plain, tokens), backend.logits(state))
    backend.advance(state, (tokens + 1) % 257)
    assert uploads[2:] == ["input_ids", "attention_mask", "position_ids"]
    np.testing.assert_array_equal(backend.decode(plain, (tokens + 1) % 257), backend.logits(state))


def test_what_cannot_run_is_said(bundle: Bundle) -> None:
    import onnxruntime

    with pytest.raises(InputError, match="'ort/choose' is not a language model"):
        load_backend(bundle, "onnx", "ort/choose")
    with pytest.raises(InputError, match="'onnx/portable' runs on the processor only"):
        load_backend(bundle, "onnx", "onnx/portable", "cuda")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(
            RuntimeMissingError, match=r"does not run on 'cuda' .*pip install 'gpt2-bundle\[onnx-gpu\]'"
        ):
            load_backend(bundle, "onnx", None, "cuda")
