"""The proof that one graph may prefill for another: of what users run, and not where it must fail."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from builder.verification import prefill_graph_loss
from builder.verification.logit_parity import greedy_tokens
from builder.verification.prefill_graph_loss import compare_prefill_graph, find_pair
from serving.backends.onnx import OnnxBackend
from serving.bundle import Bundle, open_bundle
from serving.bundle.certificate import TOO_FEW, VERIFIED, prefill_graph_status
from tests.builder.verification.test_certificate import add_to_tensor
from tests.oracles.fixtures import keras_model
from tests.serving.backends import test_prefill_graph as pairs
from tests.tiny_build import TinyBuild

GATE = 0.3
PROMPTS = [[5, 9, 200, 31, 7, 77, 140], [7], [40 + place % 7 for place in range(21)]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return pairs.write_pair(tmp_path_factory.mktemp("pair") / "bytes", ("int8", "int4"), ("int8", "int4"))


@cache
def windows() -> NDArray[np.int64]:
    """Texts that the model itself samples, [12, 40], so that another model finds them less likely."""
    model, random = keras_model("bytes"), np.random.default_rng(3)
    texts = random.integers(0, 257, (12, 1))
    for _ in range(39):
        logits = np.asarray(model(texts))[:, -1].astype(np.float64)
        tokens = (logits + random.gumbel(size=logits.shape)).argmax(-1)
        texts = np.concatenate([texts, tokens[:, None]], axis=1)
    return texts


def compare(bundle: Bundle, gate: float = GATE, length: int = 40) -> dict[str, Any]:
    model = keras_model("bytes")
    golden = {"prompts": PROMPTS, "gates": {"ort/int4": gate}}
    candidates = greedy_tokens(OnnxBackend(bundle, "ort/int4"), PROMPTS, 8)
    return compare_prefill_graph(
        bundle, "ort/int4", "ort/int8", lambda ids: np.asarray(model(ids)), golden, candidates, windows()[:, :length], 3
    )


@pytest.fixture(scope="module")
def record(bundle: Bundle) -> dict[str, Any]:
    return compare(bundle)


def test_the_figures_are_of_decode_steps_after_prompts_of_the_other_graph(
    bundle: Bundle, record: dict[str, Any]
) -> None:
    assert record["graph"] == "ort/int8" and record["prompt_tokens"] == 20
    # The prediction after a prompt is the prefill's, so 19 of the 20 tokens after each prompt count.
    assert record["tokens"] == 12 * 19
    backend = OnnxBackend(bundle, "ort/int4", prefill_graph="ort/int8")
    losses, likeliest, texts = [], 0, windows()
    expected = np.asarray(keras_model("bytes")(texts))
    state, _ = backend.prefill(texts[:, :20].tolist(), 40)
    for place in range(20, 39):
        logits = backend.decode(state, texts[:, place]).astype(np.float64)
        losses.append(np.log(np.exp(logits).sum(-1)) - logits[np.arange(12), texts[:, place + 1]])
        likeliest += int((logits.argmax(-1) == expected[:, place].argmax(-1)).sum())
    assert record["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    assert record["top1_agreement"] == pytest.approx(likeliest / (12 * 19), abs=0.01)
    assert record["same"]["perplexity"] != record["perplexity"]
    wanted = expected[:, 20:39].astype(np.float64)
    own = np.log(np.exp(wanted).sum(-1)) - np.take_along_axis(wanted, texts[:, 21:40, None], 2)[..., 0]
    assert record["perplexity_relative"] == pytest.approx(record["perplexity"] / np.exp(own.mean()) - 1, abs=1e-4)
    assert record["status"] == TOO_FEW and "problem" not in record and "by_prefill" not in record


def test_enough_tokens_within_the_gate_verify(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builder.verification.quantization_loss.FEW_TOKENS", 100)
    assert compare(bundle)["status"] == VERIFIED


def test_a_pair_over_the_gate_is_not_proven(bundle: Bundle) -> None:
    found = compare(bundle, gate=1e-9)
    assert "status" not in found and "its gate is" in found["problem"]


def test_a_prefill_graph_of_other_weights_is_found(
    tmp_path: Path, record: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph that decodes is as good as before: only what the other one writes differs."""
    from builder.onnx_export import precisions

    worse = Path(shutil.copy(pairs.WEIGHTS, tmp_path / "worse.safetensors"))
    for row in range(24):
        for column in range(0, 24, 2):
            add_to_tensor(worse, "transformer.h.0.attn.c_attn.weight", (row, column), 2.0)
    original = precisions.write_variant

    def write(traced: Any, weights: Path, precision: str, *rest: Any) -> Any:
        return original(traced, worse if precision == "int8" else weights, precision, *rest)

    monkeypatch.setattr(precisions, "write_variant", write)
    spoilt = pairs.write_pair(tmp_path / "spoilt", ("int8", "int4"), ("int8", "int4"))
    found = compare(spoilt)
    assert "its perplexity is" in found["problem"]
    assert found["same"] == record["same"]


def test_caches_of_other_types_or_scales_are_no_pair(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = pairs.write_pair(tmp_path / "half", ("int8", "int4"), ("int4",))
    assert compare(half)["problem"] == "its KV cache is of another type than that of ort/int4"
    original = prefill_graph_loss.cache_scales

    def scales(path: Path) -> Any:
        found = original(path)
        assert len(found) == 2 * bundle.manifest.model.n_layer
        first = min(found)
        return found | ({first: found[first] * np.float32(1.01)} if "int8" in path.parts else {})

    monkeypatch.setattr(prefill_graph_loss, "cache_scales", scales)
    assert compare(bundle)["problem"] == "its KV cache has other scales than that of ort/int4"


def test_a_text_without_two_halves(bundle: Bundle) -> None:
    assert "no half to read" in compare(bundle, length=2)["problem"]


def test_only_int8_prefills_and_only_for_int4(bundle: Bundle) -> None:
    both = {"ort/int8", "ort/int4"}
    assert find_pair(bundle, "ort/int4", both) == "ort/int8"
    assert find_pair(bundle, "ort/int4", {"ort/int4"}) is None
    assert find_pair(bundle, "ort/int8", both) is None


def test_a_build_proves_its_pair(built: TinyBuild) -> None:
    bundle = open_bundle(built.bundle)
    certificate = json.loads((built.bundle / "verification.json").read_text(encoding="utf-8"))
    record = certificate["variants"]["ort/int4"]["prefill_graph"]
    assert record["graph"] == "ort/int8" and record["status"] == TOO_FEW
    assert prefill_graph_status(bundle, "ort/int4") == ("ort/int8", TOO_FEW)
    assert bundle.manifest.parity["prefill_graphs"] == {
        "ort/int4": {"graph": "ort/int8", "status": TOO_FEW, "perplexity_relative": record["perplexity_relative"]}
    }
    assert "ort/int8 may prefill the prompts of ort/int4" in (built.bundle / "README.md").read_text(encoding="utf-8")
