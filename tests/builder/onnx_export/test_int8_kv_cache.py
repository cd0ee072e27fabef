"""Caches in int8: a prompt has the bits of its pieces and of its company, and is near what float32 caches give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from builder.onnx_export.calibration import Calibration
from builder.onnx_export.precisions import write_variant
from tests.oracles.fixtures import FOLDER, keras_model
from tests.oracles.tiny_bundle import trace_optimized

CAPACITY, LENGTH, UNWRITTEN = 44, 38, 7
TEXTS = np.random.default_rng(11).integers(0, 257, (3, LENGTH))
Open = Callable[[str, bool], ort.InferenceSession]


@pytest.fixture(scope="module")
def open_variant(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """A session of the fixture "bytes" in a precision, with caches in int8 or in float32."""
    model = keras_model("bytes")
    traced = trace_optimized(model)
    sessions: dict[tuple[str, bool], ort.InferenceSession] = {}

    def make(precision: str, int8_kv_cache: bool) -> ort.InferenceSession:
        if (precision, int8_kv_cache) not in sessions:
            path = tmp_path_factory.mktemp(precision) / "model.onnx"
            calibration = Calibration(model, TEXTS.astype(np.int32))
            write_variant(traced, weights(), precision, path, calibration, int8_kv_cache)
            sessions[precision, int8_kv_cache] = ort.InferenceSession(str(path))
        return sessions[precision, int8_kv_cache]

    return make


def weights() -> Path:
    return FOLDER / "bytes" / "model.safetensors"


def read(session: Any, texts: Any, pieces: Sequence[int], lengths: Any = None) -> tuple[list[Any], list[Any]]:
    """Logits after each piece, and the caches, one buffer for past and present; `lengths`: of a first piece's rows."""
    past = [value for value in session.get_inputs() if value.name.startswith("past")]
    dtype = np.int8 if past[0].type == "tensor(int8)" else np.float32
    binding, results, start = session.io_binding(), [], 0
    buffers = [np.full((len(texts), 3, CAPACITY, 8), UNWRITTEN, dtype) for _ in past]
    for value, buffer in zip(past, buffers, strict=True):
        place = ("cpu", 0, dtype, buffer.shape, buffer.ctypes.data)
        binding.bind_input(value.name, *place)
        binding.bind_output(value.name.replace("past_key_values", "present"), *place)
    logits = np.empty((len(texts), 1, 257), np.float32)
    binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
    for piece in pieces:
        end = start + piece
        mask = np.ones((len(texts), end), np.int64)
        if lengths is not None:
            mask = (np.arange(end) < np.array(lengths)[:, None]).astype(np.int64)
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(texts[:, start:end]))
        binding.bind_cpu_input("attention_mask", mask)
        binding.bind_cpu_input("position_ids", np.tile(np.arange(start, end), (len(texts), 1)))
        session.run_with_iobinding(binding)
        results.append(logits[:, 0].copy())
        start = end
    return results, buffers


def equal(caches: Sequence[Any], others: Sequence[Any], length: int) -> bool:
    return all(np.array_equal(*(each[:, :, :length] for each in pair)) for pair in zip(caches, others, strict=True))


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("pieces", [(2, 34), (18, 18), (16, 16, 4), (3, 5, 7, 11, 10)])
def test_a_prompt_in_pieces_is_the_prompt_to_the_bit(open_variant: Open, precision: str, pieces: Any) -> None:
    session = open_variant(precision, True)
    whole, caches = read(session, TEXTS[:1], (36, 1, 1))
    cut, others = read(session, TEXTS[:1], (*pieces, 1, 1))
    np.testing.assert_array_equal(cut[-3:], whole)
    assert equal(caches, others, LENGTH)
    assert all((buffer[:, :, LENGTH:] == UNWRITTEN).all() for buffer in others), "written behind the text"


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_prompt_in_company_is_the_prompt_to_the_bit(open_variant: Open, precision: str) -> None:
    session, lengths = open_variant(precision, True), (5, 36, 20)
    together, caches = read(session, TEXTS, (36,), lengths)
    for row, length in enumerate(lengths):
        alone, own = read(session, TEXTS[row : row + 1], (length,))
        np.testing.assert_array_equal(alone[0][0], together[0][row])
        assert equal(own, [buffer[row : row + 1] for buffer in caches], length)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_it_is_near_to_caches_in_float32(open_variant: Open, precision: str) -> None:
    """Prompt, a piece behind it, and steps: by the branch for prompts and the one for steps."""
    pieces = (20, 15, 1, 1, 1)
    rounded, caches = read(open_variant(precision, True), TEXTS[:1], pieces)
    exact, floats = read(open_variant(precision, False), TEXTS[:1], pieces)
    spread = np.ptp(exact[0])
    assert 0 < np.abs(np.array(rounded) - exact).max() < 0.03 * spread
    # Values are told by the scales that the file keeps, as docs/format.md says.
    model = onnx.load(open_variant(precision, True)._model_path)
    scales = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for index, part in enumerate(("key", "value")):
        scale = scales[f"present.0.{part}_scale"]
        wide = caches[index][:, :, :LENGTH] * scale
        # Half a step of rounding; and what passes the range that was seen in float32 is cut off.
        kept = np.clip(floats[index][:, :, :LENGTH], -128 * scale, 127 * scale)
        assert (np.abs(wide - kept) <= 0.51 * scale).all()


def test_attention_names_all_its_outputs(open_variant: Open) -> None:
    """ONNX Runtime 1.28 to 1.30 end with a segmentation fault where the caches among them have no names."""
    graph = onnx.load(open_variant("int8", True)._model_path, load_external_data=False).graph
    branches = [item.g for node in graph.node if node.op_type == "If" for item in node.attribute]
    attention = [node for branch in branches for node in branch.node if node.op_type == "GroupQueryAttention"]
    assert len(attention) == len(branches) > 0
    assert all(len(node.output) == 3 and all(node.output) for node in attention)
