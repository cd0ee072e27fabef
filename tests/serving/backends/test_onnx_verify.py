"""Verify steps of quantized graphs have the bits of single-token steps, or are not used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from builder.verification.speculation_parity import compare_speculation
from serving.backends.onnx import OnnxBackend
from serving.backends.onnx_session import open_graph
from serving.backends.onnx_verify import CHAIN, VerifySession, with_chains
from serving.backends.verify_steps import CHAIN_STEP, MAX_WEIGHTS, SpeculationMode, speculates, wants_verify_session
from serving.bundle import Bundle
from serving.engine.config import EngineConfig, estimate_memory
from serving.engine.engine import open_engine
from serving.engine.onnx_slot_backend import OnnxSlotBackend
from serving.generation import generate, stream
from serving.sampling import SamplingParams
from tests.oracles.fixtures import FOLDER
from tests.serving.engine.test_int8 import traced, write_one_graph
from tests.serving.generation.test_speculative_decode import SETTINGS, _texts, counted

REPEATED = [40 + place % 7 for place in range(14)]


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_one_graph(tmp_path_factory.mktemp("verify") / "bytes", "int8")


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_one_graph(tmp_path_factory.mktemp("verify") / "four", "int4")


def test_every_bit_of_a_verify_step_is_that_of_single_token_steps(int8: Bundle) -> None:
    """Logits and KV cache, in any slot, on top of decode steps, with and without padding."""
    backend = OnnxSlotBackend(int8, "ort/int8", slots=3, max_length=48, speculation=True)
    assert backend.verify_step == CHAIN_STEP
    tokens = np.random.default_rng(0).integers(0, 257, 48).tolist()
    for slot in (0, 2):
        backend.prefill_chunk(slot, tokens[:9], 0)
    place = 9
    for count in (4, 2, 3, 4, 4):
        lengths = np.array([47, 47, place])
        single = []
        for offset in range(count):
            fed = np.array([0, 0, tokens[place + offset]])
            single.append(backend.decode(fed, lengths + np.array([0, 0, offset]))[2].copy())
        found = backend.verify(0, tokens[place : place + count], place)
        place += count
        np.testing.assert_array_equal(found, np.stack(single))
        for buffer in backend._buffers:
            np.testing.assert_array_equal(buffer.array[0, :, :place], buffer.array[2, :, :place])
    backend.close()


def test_the_padding_may_stand_after_the_context(int8: Bundle) -> None:
    backend = OnnxSlotBackend(int8, "ort/int8", slots=2, max_length=48, speculation=True)
    tokens = np.random.default_rng(1).integers(0, 257, 48).tolist()
    for slot in (0, 1):
        backend.prefill_chunk(slot, tokens[:46], 0)
    before = backend._buffers[0].array[1].copy()
    found = backend.verify(0, tokens[46:], 46)
    single = [backend.prefill_chunk(1, tokens[place : place + 1], place).copy() for place in (46, 47)]
    np.testing.assert_array_equal(found, np.stack(single))
    np.testing.assert_array_equal(backend._buffers[0].array[1, :, :46], before[:, :46])
    backend.close()


@pytest.mark.usefixtures("eager")
def test_generation(int8: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = counted(monkeypatch)
    plain, ours = OnnxBackend(int8, "ort/int8"), OnnxBackend(int8, "ort/int8", speculation=True)
    assert plain.verify_step is None and ours.verify_step == CHAIN_STEP
    for seed in range(6):
        for params in SETTINGS:
            each = SamplingParams(**{**vars(params), "max_new_tokens": 40, "seed": seed})
            prompt = REPEATED if seed % 2 else [seed, 250 - seed, 7]
            assert generate(ours, [prompt], each, 256) == generate(plain, [prompt], each, 256)
    assert sum(each.accepted for each in steps) > 20 and not any(each.replayed for each in steps)


@pytest.mark.usefixtures("eager")
def test_two_streams_take_turns(int8: Bundle) -> None:
    backend = OnnxBackend(int8, "ort/int8", speculation=True)
    params, prompts = SamplingParams(max_new_tokens=30, ignore_eos=True), [REPEATED, REPEATED[3:]]
    alone = [list(stream(backend, prompt, params, 256)) for prompt in prompts]
    together = list(zip(*(stream(backend, prompt, params, 256) for prompt in prompts), strict=True))
    assert [list(row) for row in zip(*together, strict=True)] == alone


@pytest.mark.usefixtures("eager")
def test_an_engine(int8: Bundle) -> None:
    results = []
    for speculation in get_args(SpeculationMode):
        config = EngineConfig(slots=3, speculation=speculation)
        engine = open_engine(int8, "ort/int8", config=config)
        try:
            results.append(_texts(engine))
            assert (engine.stats().accepted_prompt_tokens > 0) == (speculation == "on")
        finally:
            engine.close()
    assert results[0] == results[1] == results[2]


def test_where_bits_differ_nothing_is_speculated(int8: Bundle, int4: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session that steps are compared with is of other weights here."""
    session = open_graph(int8, "ort/int8", "cpu", 1)
    assert VerifySession(int8, "ort/int8", 1, session).exact
    assert not VerifySession(int8, "ort/int8", 1, open_graph(int4, "ort/int4", "cpu", 1)).exact
    monkeypatch.setattr(VerifySession, "_compare", lambda *_: False)
    assert OnnxBackend(int8, "ort/int8", speculation=True).verify_step is None
    backend = OnnxSlotBackend(int8, "ort/int8", slots=1, max_length=48, speculation=True)
    assert backend.verify_step is None
    backend.close()


def test_the_certificate(int8: Bundle) -> None:
    prompts = [[5, 9, 200], [7], REPEATED]
    rows = generate(OnnxBackend(int8, "ort/int8"), prompts, SamplingParams(max_new_tokens=20, ignore_eos=True), 256)
    record = compare_speculation(int8, "ort/int8", prompts, np.array([row.token_ids for row in rows]), 3)
    assert record is not None and record["deviation"] == 0
    assert record["verified"] == {"of": 57, "certain": 57, "equal": 57}


def test_a_large_graph_gets_no_second_session(int8: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wants_verify_session(int8, "ort/int8") and int8.graph_size("ort/int8") < MAX_WEIGHTS
    on, off = (estimate_memory(int8, "ort/int8", EngineConfig(speculation=each)) for each in ("on", "off"))
    assert on.weights == 2 * off.weights
    proven = replace(int8, manifest=replace(int8.manifest, parity={"speculation": {"verified": {"of": 1}}}))
    assert speculates(proven, "ort/int8", "on") and not speculates(proven, "ort/int8", "auto")
    monkeypatch.setattr("serving.backends.verify_steps.MAX_WEIGHTS", int8.graph_size("ort/int8") - 1)
    assert OnnxBackend(int8, "ort/int8", speculation=True).verify_step is None


def test_a_graph_of_other_nodes_stays_as_it_is(tmp_path: Path) -> None:
    import onnx

    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    value = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in ("x", "y")]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "other", value[:1], value[1:]))
    assert with_chains(model.SerializeToString(), CHAIN) is None
    assert with_chains(b"\xff not a model", CHAIN) is None


def test_int8_caches_too(tmp_path: Path) -> None:
    """The graph whose single-token attention is in a branch."""
    from builder.onnx_export.precisions import write_variant

    class Ranges:
        def largest(self, block: int) -> Any:
            heads, width = 3, 8
            return np.full((heads, width), 3, np.float32), np.full((heads, width), 3, np.float32)

    folder = tmp_path / "caches"
    weights = FOLDER / "bytes" / "model.safetensors"
    model = write_variant(traced(), weights, "int8", folder / "model.onnx", Ranges(), int8_kv_cache=True)  # type: ignore[arg-type]
    changed = with_chains(model.SerializeToString(), CHAIN)
    assert changed is not None
    import onnx

    graph = onnx.ModelProto.FromString(changed).graph
    kinds = [each.op_type for each in graph.node]
    blocks = sum(value.name.endswith(".key") and value.name.startswith("past") for value in graph.input)
    assert "If" not in kinds and kinds.count("GroupQueryAttention") == CHAIN * blocks
