"""What calibration sees: a block's inputs and the ranges of its caches, against another path to the same numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from builder.onnx_export.calibration import LENGTH, TEXTS, Calibration, calibration_texts
from tests.oracles.fixtures import keras_model

TEXT = np.random.default_rng(7).integers(0, 257, (11, 20)).astype(np.int32)


def test_moments_are_those_of_the_layers_inputs() -> None:
    """The first product's inputs by hand, and the second moments of any set of rows."""
    model = keras_model("bytes")
    hidden = model.wte(TEXT) + model.wpe(np.arange(20)[None])
    rows = np.asarray(model.blocks[0].ln_1(hidden)).reshape(-1, model.geometry.n_embd)
    calibration = Calibration(model, TEXT)
    moments = calibration.moments("transformer.h.0.attn.c_attn.weight")
    np.testing.assert_allclose(moments, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    for name, width in (("attn.c_proj", 24), ("mlp.c_fc", 24), ("mlp.c_proj", 96)):
        moments = calibration.moments(f"transformer.h.1.{name}.weight")
        assert moments.shape == (width, width) and np.linalg.eigvalsh(moments).min() > -1e-4
    for block in model.blocks:
        hidden = block(hidden, kernels=model.plain)
    rows = np.asarray(model.ln_f(hidden)).reshape(-1, 24)
    head = calibration.moments("transformer.wte.weight")
    np.testing.assert_allclose(head, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(Calibration(model, TEXT).moments("transformer.wte.weight"), head)
    with pytest.raises(AssertionError, match="in the model's order"):
        calibration.largest(0)


def test_ranges_are_those_of_the_graphs_caches(graph_path: Callable[[str, str], Path]) -> None:
    """Of all rows, whichever are looked at last."""
    session = ort.InferenceSession(str(graph_path("bytes", "portable")))
    empty = np.zeros((len(TEXT), 3, 0, 8), np.float32)
    feeds = {"input_ids": TEXT.astype(np.int64), "attention_mask": np.ones(TEXT.shape, np.int64)}
    feeds["position_ids"] = np.broadcast_to(np.arange(20), TEXT.shape).astype(np.int64)
    feeds |= {value.name: empty for value in session.get_inputs() if value.name.startswith("past")}
    for text in (TEXT, TEXT[::-1]):
        calibration = Calibration(keras_model("bytes"), text)
        for block in range(2):
            for part, largest in zip(("key", "value"), calibration.largest(block), strict=True):
                (cache,) = session.run([f"present.{block}.{part}"], feeds)
                np.testing.assert_allclose(largest, np.abs(cache).max((0, 2)), rtol=1e-4)


def test_texts_are_stretches_of_the_shard(tmp_path: Path) -> None:
    shard = tmp_path / "train.bin"
    np.arange(300, 1300, dtype=np.uint16).tofile(shard)
    shard.with_suffix(".json").write_text(json.dumps({"dtype": "uint16", "count": 1000}))
    texts = calibration_texts(shard, 1024, 3)
    assert texts.shape == (TEXTS, LENGTH) and (np.diff(texts) == 1).all() and len(set(texts[:, 0])) > 20
    assert calibration_texts(shard, 16, 3).shape == (TEXTS, 16)
    np.arange(300, 320, dtype=np.uint16).tofile(shard)
    shard.with_suffix(".json").write_text(json.dumps({"dtype": "uint16", "count": 20}))
    assert (calibration_texts(shard, 1024, 3) == np.arange(300, 320)).all(), "all that there is"
