"""Every slot backend: the same cases, against the closed form or PyTorch's logits of a small real model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.backends.base import FloatArray
from serving.backends.loader import load_backend
from serving.bundle import Bundle, open_bundle
from serving.engine.api import GenerationRequest
from serving.engine.config import EngineConfig, estimate_memory
from serving.engine.engine import SlotEngine, open_engine
from serving.engine.slot_backend import SlotBackend, cache_bytes
from serving.errors import InputError
from serving.generation import generate
from serving.sampling import SamplingParams
from serving.sampling.detokenizer import load_tokenizer
from tests.closed_form import ClosedFormSlotBackend, logits_after
from tests.oracles.fixtures import max_difference, read_cases
from tests.serving.engine.harness import EOS, Heard, Observed

LIMIT, CHUNK, SLOTS = 48, 8, 4


@dataclass
class Case:
    """A backend, two texts of 48 tokens, and what the logits after a beginning of one must be."""

    backend: SlotBackend
    texts: list[list[int]]
    logits: Callable[[int, int], FloatArray]
    tolerance: float


@pytest.fixture(scope="module")
def bundle(real_bundle: Path) -> Bundle:
    return open_bundle(real_bundle)


@pytest.fixture(scope="module", params=["closed-form", "ort/fp32"])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    fixture = read_cases("bytes")["full"]
    texts = [fixture.ids[row].tolist() for row in range(2)]
    if request.param == "closed-form":
        closed = ClosedFormSlotBackend(SLOTS, LIMIT, CHUNK)
        yield Case(closed, texts, lambda row, length: logits_after(texts[row][:length], 257), 0)
        return
    from serving.engine.onnx_slot_backend import OnnxSlotBackend

    bundle = request.getfixturevalue("bundle")
    backend = OnnxSlotBackend(bundle, request.param, slots=SLOTS, max_length=LIMIT)
    yield Case(backend, texts, lambda row, length: fixture.logits[row, length - 1], 1e-4)
    backend.close()
    backend.close()


def read(backend: SlotBackend, slot: int, tokens: Sequence[int]) -> FloatArray:
    for start in range(0, len(tokens), CHUNK):
        logits = backend.prefill_chunk(slot, tokens[start : start + CHUNK], start)
    return logits.copy()


def test_a_prompt_in_pieces_in_any_slot(case: Case) -> None:
    for slot, row, length in ((0, 0, 1), (3, 1, 8), (1, 0, 21), (2, 1, 47), (3, 0, 16)):
        logits = read(case.backend, slot, case.texts[row][:length])
        assert logits.shape == (257,) and logits.dtype == np.float32
        assert max_difference(logits, case.logits(row, length)) <= case.tolerance


def test_a_scored_chunk_has_the_logits_after_each_token_and_writes_what_a_plain_one_does(case: Case) -> None:
    text = case.texts[0]
    plain = read(case.backend, 1, text[:24])
    scored = [case.backend.score_chunk(2, text[start : start + CHUNK], start).copy() for start in (0, 8, 16)]
    found = np.concatenate(scored)
    assert found.shape == (24, 257) and found.dtype == np.float32
    for place in range(24):
        assert max_difference(found[place], case.logits(0, place + 1)) <= case.tolerance
    # The cache is the same to the bit: what is read after it, and decoded after it, does not differ.
    np.testing.assert_array_equal(case.backend.prefill_chunk(2, text[16:24], 16), plain)
    for slot in (1, 2):
        case.backend.prefill_chunk(slot, text[24:32], 24)
    both = case.backend.decode(np.array([0, text[32], text[32]]), np.array([0, 32, 32]))
    np.testing.assert_array_equal(both[1], both[2])


def test_leading_rows_decode_together_wherever_they_are(case: Case) -> None:
    lengths = np.array([5, 17, 40])
    rows = [0, 1, 0]
    for slot, (row, length) in enumerate(zip(rows, lengths.tolist(), strict=True)):
        read(case.backend, slot, case.texts[row][:length])
    for step in range(7):
        # The last slots drop out one by one; the first ones go on in the same memory.
        count = 3 if step < 4 else 2
        tokens = np.array([case.texts[row][length] for row, length in zip(rows, lengths.tolist(), strict=True)])
        logits = case.backend.decode(tokens[:count], lengths[:count])
        assert logits.shape == (count, 257)
        lengths[:count] += 1
        for slot in range(count):
            wanted = case.logits(rows[slot], int(lengths[slot]))
            assert max_difference(logits[slot], wanted) <= case.tolerance


def test_a_row_beside_a_prompt_that_is_being_read(case: Case) -> None:
    read(case.backend, 1, case.texts[1][:9])
    lengths = np.array([0, 9])
    for start in range(0, 40, CHUNK):
        case.backend.prefill_chunk(0, case.texts[0][start : start + CHUNK], start)
        # The row of slot 0 is nobody's: it writes behind what was read, where the next piece goes.
        lengths[0] = start + CHUNK
        logits = case.backend.decode(np.array([0, case.texts[1][lengths[1]]]), lengths)
        lengths[1] += 1
        assert max_difference(logits[1], case.logits(1, int(lengths[1]))) <= case.tolerance
    logits = case.backend.prefill_chunk(0, case.texts[0][40:47], 40)
    assert max_difference(logits, case.logits(0, 47)) <= case.tolerance


def test_a_copied_prefix_is_the_same_bit_for_bit(case: Case) -> None:
    text = case.texts[0][:30]
    alone = read(case.backend, 2, text)
    for target in (0, 3):
        read(case.backend, target, case.texts[1][:40])
        case.backend.copy_prefix(2, target, 24)
        np.testing.assert_array_equal(case.backend.prefill_chunk(target, text[24:], 24), alone)
    read(case.backend, 1, case.texts[1][:11])
    case.backend.decode(np.zeros(4, np.int64), np.array([30, 11, 30, 30]))
    np.testing.assert_array_equal(read(case.backend, 1, text), alone)


def test_where_a_prompt_is_cut_does_not_show(case: Case) -> None:
    text = case.texts[1][:45]
    whole = case.backend.prefill_chunk(0, text[:40], 0).copy(), case.backend.prefill_chunk(0, text[40:], 40).copy()
    assert max_difference(whole[1], case.logits(1, 45)) <= case.tolerance
    for sizes in ((8, 8, 8, 8, 8), (16, 24), (32, 8), (2, 3, 5, 7, 11, 12), (4, 4, 4, 6, 9, 13)):
        start = 0
        for size in sizes:
            logits = case.backend.prefill_chunk(1, text[start : start + size], start)
            start += size
        np.testing.assert_array_equal(logits, whole[0])
        np.testing.assert_array_equal(case.backend.prefill_chunk(1, text[40:], 40), whole[1])


@pytest.mark.parametrize("supports_device_sampling", [False, True])
def test_the_engine_says_what_generation_says(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle, supports_device_sampling: bool
) -> None:
    """Wherever tokens are chosen; where the graph does it, logits come here only for those that are not certain."""
    from serving.engine.onnx_slot_backend import OnnxSlotBackend

    # Few enough that some draws fall behind them.
    monkeypatch.setattr("serving.engine.device_sampler.USUAL_CANDIDATES", 60)
    random = np.random.default_rng(5)
    slots = OnnxSlotBackend(
        bundle, "ort/fp32", slots=SLOTS, max_length=LIMIT, supports_device_sampling=supports_device_sampling
    )
    calls = Counter[str]()
    for name in ("decode", "advance", "sample_tokens", "logits"):
        _count(slots, name, calls)
    engine = SlotEngine(slots, load_tokenizer(bundle), EOS, EngineConfig(slots=SLOTS, prefill_chunk=CHUNK))
    backend = load_backend(bundle, "onnx", "ort/fp32")
    start = random.integers(0, 256, 17).tolist()
    requests = [
        GenerationRequest(
            (*start[: random.integers(0, 18)], *random.integers(0, 256, random.integers(1, 25)).tolist()),
            SamplingParams(
                max_new_tokens=int(random.integers(1, 30)),
                temperature=float(random.choice([0.0, 0.8, 1.5])),
                top_k=int(random.choice([0, 20])),
                top_p=float(random.choice([0.8, 1.0])),
                repetition_penalty=float(random.choice([1.0, 1.3])),
                min_tokens=int(random.choice([0, 5])),
                stop_token_ids=(3, 4) if number % 3 else (),
                seed=number,
            ),
            n=int(random.choice([1, 1, 2, 4])),
            prompt_logprobs=1 if number % 7 == 0 else None,
            logprobs=2 if number % 11 == 0 else None,
        )
        for number in range(40)
    ]
    heard = [Heard(request) for request in requests]
    for each in heard:
        engine.submit(each.request, each)
    assert engine.drain(60)
    engine.close()
    for each in heard:
        for index in range(each.request.n):
            params = replace(each.request.params, seed=each.request.seed(index))
            (wanted,) = generate(backend, [each.request.prompt], params, EOS)
            assert (tuple(each.ids(index)), each.ends[index].reason) == (wanted.token_ids, wanted.finish_reason)
    assert any(each.prompt and each.prompt.cached_tokens for each in heard)
    assert calls["decode"]
    if supports_device_sampling:
        assert 0 < calls["logits"] < calls["sample_tokens"] == calls["advance"]
    else:
        assert not calls["advance"]


def _count(backend: Any, name: str, calls: Counter[str]) -> None:
    """Have `calls` count the calls of a method of `backend`."""
    method = getattr(backend, name)

    def counted(*arguments: Any) -> Any:
        calls[name] += 1
        return method(*arguments)

    setattr(backend, name, counted)


def test_every_token_of_a_prompt_that_fills_the_context_is_scored(bundle: Bundle) -> None:
    fixture = read_cases("bytes")["full"]
    length = bundle.manifest.model.n_positions
    assert fixture.ids.shape[1] >= length
    observed = Observed()
    engine = open_engine(bundle, config=EngineConfig(slots=SLOTS, prefill_chunk=CHUNK), observer=observed)
    rows = range(2)
    heard = [
        Heard(
            GenerationRequest(
                tuple(fixture.ids[row, :length].tolist()), SamplingParams(), prompt_logprobs=0, prompt_only=True
            )
        )
        for row in rows
    ]
    for each in heard:
        engine.submit(each.request, each)
    assert engine.drain(60)
    engine.close()
    for row in rows:
        logits = fixture.logits[row, : length - 1].astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        wanted = logs[np.arange(length - 1), fixture.ids[row, 1:length]]
        prompt = heard[row].prompt
        assert prompt is not None and prompt.logprobs is not None and prompt.logprobs[0] is None
        found = [each.own for each in prompt.logprobs if each is not None]
        np.testing.assert_allclose(found, wanted, atol=2e-4)
    assert observed.steps and not any(step.decoded_rows for step in observed.steps), "no token took a decode step"


def test_alone_is_beside_others(bundle: Bundle) -> None:
    """Though its prompt is read, and its tokens are made, in a company that comes and goes."""
    prompt = tuple(read_cases("bytes")["full"].ids[0, :29].tolist())
    params = SamplingParams(max_new_tokens=19, temperature=1.2, seed=11, ignore_eos=True)
    request = GenerationRequest(prompt, params, logprobs=5)
    runs = []
    for company in (0, 9):
        engine: SlotEngine = open_engine(bundle, config=EngineConfig(slots=SLOTS, prefill_chunk=CHUNK))
        others = [
            GenerationRequest((*prompt[: 8 * (number % 4)], number), SamplingParams(max_new_tokens=1 + 2 * number))
            for number in range(company)
        ]
        heard = Heard(request)
        for other in others[:5]:
            engine.submit(other, Heard(other))
        engine.submit(request, heard)
        for other in others[5:]:
            engine.submit(other, Heard(other))
        assert engine.drain(60)
        engine.close()
        runs.append(heard)
    assert runs[0].ids() == runs[1].ids()
    for one, two in zip(runs[0].tokens[0], runs[1].tokens[0], strict=True):
        assert one.logprobs is not None and two.logprobs is not None
        assert abs(one.logprobs.own - two.logprobs.own) < 1e-5


def test_graphs_without_a_shared_buffer_are_refused(bundle: Bundle) -> None:
    for graph in ("onnx/portable", "savedmodel/decode"):
        with pytest.raises(InputError, match="has no shared cache buffer"):
            open_engine(bundle, graph)
    with pytest.raises(InputError, match="no device 'gpu'"):
        open_engine(bundle, device="gpu")
    with pytest.raises(InputError, match="max_length is 99"):
        open_engine(bundle, config=EngineConfig(max_length=99))


def test_the_memory_estimate_counts_the_arrays(bundle: Bundle) -> None:
    from serving.engine.onnx_slot_backend import OnnxSlotBackend

    backend: Any = OnnxSlotBackend(bundle, slots=3, max_length=20)
    arrays = sum(buffer.array.nbytes for buffer in backend._buffers)
    estimate = estimate_memory(bundle, "ort/fp32", EngineConfig(slots=3, max_length=20))
    assert backend.cache_bytes == arrays == estimate.cache
    assert cache_bytes(bundle.manifest.model, 3, 20, "float16") == arrays / 2
    assert estimate.total == estimate.weights + arrays + (4 + 20) * 257 * 4
    assert estimate.weights >= 2 * bundle.path("ort/fp32/model.onnx_data").stat().st_size
    backend.close()
