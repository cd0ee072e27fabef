"""Prompts by other nodes: the same logits, a prompt has the bits of its pieces and of its company, files stay as is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from serving.backends import onnx_session
from serving.backends.onnx import OnnxBackend
from serving.backends.onnx_prompts import with_fast_prompts
from serving.bundle import Bundle, open_bundle
from serving.engine.onnx_slot_backend import OnnxSlotBackend
from tests.tiny_build import TinyBuild

GRAPHS = ["ort/fp32", "ort/int8", "ort/int4"]
TEXTS = np.random.default_rng(5).integers(0, 300, (3, 48)).tolist()
BLOCKS, HEADS = 2, 2
changed = partial(with_fast_prompts, heads=HEADS, branches=True, unread=True)


@pytest.fixture
def bundle(built: TinyBuild, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """The tiny bundle, taken for a large one, whose steps do not suffer from a branch."""
    monkeypatch.setattr(onnx_session, "is_small", lambda *_: False)
    return open_bundle(built.bundle)


def attentions(data: bytes) -> tuple[list[Any], list[Any]]:
    """The attention of prompts and that of steps, in every block with branches."""
    found: dict[str, list[Any]] = {"then_branch": [], "else_branch": []}
    for node in onnx.load_from_string(data).graph.node:
        for branch in node.attribute if node.op_type == "If" else ():
            found[branch.name] += [each for each in branch.g.node if each.op_type == "GroupQueryAttention"]
    return found["then_branch"], found["else_branch"]


@pytest.mark.parametrize("graph", GRAPHS)
def test_only_the_attention_of_prompts_is_another(bundle: Bundle, graph: str) -> None:
    data = bundle.read(bundle.graph(graph).path)
    model = onnx.load_from_string(changed(data))
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    before, after = attentions(data), attentions(changed(data))
    assert [len(each) for each in after] == [BLOCKS, BLOCKS]
    if graph == "ort/fp32":
        assert before == ([], [])
        assert all(len(prompt.input) == 12 and prompt.input[11] for prompt in after[0])
        assert all(len(step.input) <= 11 for step in after[1])
    else:
        assert after[1] == before[1]
        assert [len(prompt.output) for prompt in (*before[0], *after[0])] == [3] * BLOCKS + [1] * BLOCKS


def test_what_it_does_not_know_stays_as_it_is(bundle: Bundle) -> None:
    fp32, int8 = (bundle.read(bundle.graph(graph).path) for graph in ("ort/fp32", "ort/int8"))
    assert changed(b"GroupQueryAttention\xff\xff") == b"GroupQueryAttention\xff\xff"
    assert with_fast_prompts(fp32, HEADS, branches=False, unread=True) == fp32
    assert with_fast_prompts(int8, HEADS, branches=True, unread=False) == int8
    portable = bundle.read(bundle.graph("onnx/portable").path)
    assert changed(portable) == portable


@pytest.mark.parametrize(
    ("version", "branched", "outputs"),
    [
        ("1.27.0", False, 3),
        ("1.28.1", True, 3),
        ("1.30.0", True, 3),
        ("1.31.0", True, 1),
        ("2.0", True, 1),
        ("?", False, 3),
    ],
)
def test_the_version_of_onnx_runtime_decides(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, version: str, branched: bool, outputs: int
) -> None:
    opened: list[bytes] = []

    def session(graph: bytes, *_: Any, **__: Any) -> Any:
        opened.append(graph)
        raise RuntimeError("seen")

    monkeypatch.setattr(onnx_session, "INT8_CACHES", (0, 0))
    monkeypatch.setattr(ort, "InferenceSession", session)
    monkeypatch.setattr(ort, "__version__", version)
    for graph in ("ort/fp32", "ort/int8"):
        with pytest.raises(onnx_session.BundleError, match="seen"):
            onnx_session.open_graph(bundle, graph, "cpu", 1)
    fp32, _, int8, _ = opened
    assert bool(attentions(fp32)[0]) == branched
    assert [len(node.output) for node in attentions(int8)[0]] == [outputs] * BLOCKS


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_prompt_and_its_steps_are_those_of_the_file(
    bundle: Bundle, graph: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [text[:length] for text, length in zip(TEXTS, (30, 2, 17), strict=True)]
    runs = []
    for change in (with_fast_prompts, lambda data, *_, **__: data):
        monkeypatch.setattr(onnx_session, "with_fast_prompts", change)
        backend = OnnxBackend(bundle, graph)
        state, logits = backend.prefill(prompts, 40)
        runs.append([logits, *(backend.decode(state, np.array([7, 70, 170]) + step).copy() for step in range(4))])
    for fast, plain in zip(*runs, strict=True):
        if graph != "ort/fp32":
            np.testing.assert_array_equal(fast, plain)
        np.testing.assert_allclose(fast, plain, atol=2e-6 * np.abs(plain).max())


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_prompt_in_company_is_the_prompt_to_the_bit(bundle: Bundle, graph: str) -> None:
    backend = OnnxBackend(bundle, graph)
    prompts = [text[:length] for text, length in zip(TEXTS, (5, 36, 20), strict=True)]
    _, together = backend.prefill(prompts, 40)
    for row, prompt in enumerate(prompts):
        np.testing.assert_array_equal(backend.prefill([prompt], 40)[1][0], together[row])


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("pieces", [(2, 34), (18, 18), (16, 16, 4), (3, 5, 7, 11, 10)])
def test_a_prompt_in_pieces_is_the_prompt_to_the_bit(bundle: Bundle, graph: str, pieces: Sequence[int]) -> None:
    backend = OnnxSlotBackend(bundle, graph, slots=2, max_length=48)
    whole = backend.prefill_chunk(0, TEXTS[0][:36], 0).copy()
    start = 0
    for piece in pieces:
        logits = backend.prefill_chunk(1, TEXTS[0][start : start + piece], start)
        start += piece
    np.testing.assert_array_equal(logits, whole)
    for buffer in backend._buffers:
        np.testing.assert_array_equal(buffer.array[0, :, :36], buffer.array[1, :, :36])
    backend.close()


@pytest.mark.parametrize("graph", [*GRAPHS, "onnx/portable"])
def test_memory_is_not_planned_by_pattern(bundle: Bundle, graph: str) -> None:
    """From the second batch on, steps of int8 at 64 rows took a fifth longer (docs/decisions/onnx-runtime.md)."""
    assert not onnx_session.open_graph(bundle, graph, "cpu", 1).get_session_options().enable_mem_pattern
