"""Each operation that a target replaces equals its definition, and every cache equals the whole text again."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from builder.keras_backend import keras, tf
from builder.model.kernels import Kernels
from builder.tf_export.kernels import LoopKernels, PromptKernels, StepKernels
from builder.tf_export.weight_layout import ServedWeights
from tests.oracles.fixtures import NAMES, keras_model, max_difference, read_cases

TOLERANCE = 1e-4


def random(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_attention_is_its_definition() -> None:
    batch, length, heads, head_dim = 2, 7, 3, 4
    qkv = random(batch, length, 3 * heads * head_dim)
    ours = Kernels(heads).attention(0, tf.constant(qkv), training=False).numpy()
    width = heads * head_dim
    query, key, value = qkv[..., :width], qkv[..., width : 2 * width], qkv[..., 2 * width :]
    for row in range(batch):
        for head in range(heads):
            part = slice(head * head_dim, (head + 1) * head_dim)
            for position in range(length):
                scores = key[row, : position + 1, part] @ query[row, position, part] / np.sqrt(head_dim)
                weights = np.exp(scores - scores.max())
                expected = weights @ value[row, : position + 1, part] / weights.sum()
                np.testing.assert_allclose(ours[row, position, part], expected, atol=1e-6)


def test_a_row_that_sees_nothing_stays_finite() -> None:
    query, key, value = (tf.constant(random(1, 2, 3, 4, seed=seed)) for seed in range(3))
    visible = np.zeros((1, 1, 3, 3), bool)
    context = Kernels(2).attend(query, key, value, visible).numpy()
    np.testing.assert_allclose(context, np.broadcast_to(value.numpy().mean(2, keepdims=True), context.shape), atol=1e-6)


def test_softmax_is_in_float32_whatever_comes_in() -> None:
    query = tf.cast(tf.constant(random(1, 1, 64, 8)) * 3, tf.float16)
    context = Kernels(1).attend(query, query, query, True)
    assert context.dtype == tf.float16
    exact = tf.cast(query, tf.float64)
    scores = tf.matmul(exact, exact, transpose_b=True) / np.sqrt(8)
    assert max_difference(context, tf.matmul(tf.nn.softmax(scores), exact)) < 0.02


def test_split_and_merge_are_inverse() -> None:
    kernels, qkv = Kernels(3), random(2, 5, 36)
    for part, heads in enumerate(kernels.split_heads(tf.constant(qkv))):
        assert heads.shape == (2, 3, 5, 4)
        np.testing.assert_array_equal(kernels.merge_heads(heads), qkv[..., 12 * part : 12 * part + 12])


@pytest.mark.parametrize("kind", [Kernels, PromptKernels])
def test_elementwise_operations_are_their_definitions(kind: type) -> None:
    geometry = keras_model("wide_heads").geometry
    kernels = Kernels(2) if kind is Kernels else PromptKernels(geometry, None, last=False)
    x = random(40, 48)
    gelu = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(kernels.activate(tf.constant(x)), gelu, atol=1e-6)
    norm = keras.layers.LayerNormalization(epsilon=geometry.layer_norm_epsilon)
    norm.build((None, 48))
    norm.gamma.assign(random(48, seed=1))
    norm.beta.assign(random(48, seed=2))
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3)
    expected = normed * random(48, seed=1) + random(48, seed=2)
    np.testing.assert_allclose(kernels.layer_norm(norm, tf.constant(x)), expected, atol=1e-5)


def test_the_head_gives_float32_logits() -> None:
    hidden, wte = random(2, 3, 8), random(11, 8, seed=1)
    logits = Kernels(2).lm_head(tf.cast(hidden, tf.float16), tf.constant(wte))
    assert logits.dtype == tf.float32
    np.testing.assert_allclose(logits, hidden @ wte.T, atol=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_prompt_and_steps_equal_the_whole_text(name: str) -> None:
    """Two rows of different prompt lengths, padded with garbage, then fed the text's own next tokens."""
    model, case = keras_model(name), read_cases(name)["full"]
    geometry = model.geometry
    lengths = np.array([3, 7], np.int32)
    prompts = case.ids[:, :9].astype(np.int32)
    kernels = PromptKernels(geometry, tf.constant(lengths), last=True)
    logits = run(model, prompts, None, kernels)
    rows = np.arange(2)
    assert max_difference(logits, case.logits[rows, lengths - 1]) < TOLERANCE
    capacity = geometry.n_positions
    padding = [[0, 0], [0, 0], [0, capacity - 9], [0, 0]]
    cache = [(tf.pad(key, padding), tf.pad(value, padding)) for key, value in kernels.present]
    while lengths.max() < capacity:
        step = StepKernels(geometry, tf.constant(lengths), cache)
        tokens = case.ids[rows, lengths][:, None].astype(np.int32)
        logits = run(model, tokens, lengths[:, None], step)
        difference = max_difference(logits, case.logits[rows, lengths])
        assert difference < TOLERANCE, (difference, lengths)
        cache, lengths = step.present, lengths + 1


@pytest.mark.parametrize("name", ["wide_heads", "bytes"])
def test_a_loop_that_writes_in_place_equals_the_whole_text(name: str) -> None:
    model, case = keras_model(name), read_cases(name)["full"]
    geometry = model.geometry
    start, steps, width = np.array([2, 6], np.int32), 10, 8
    prompt = PromptKernels(geometry, tf.constant(start), last=True)
    run(model, case.ids[:, :width].astype(np.int32), None, prompt)
    # Garbage where nothing was written yet must not be seen.
    padded = [[tf.pad(part, [[0, 0], [0, 0], [0, steps], [0, 0]], constant_values=50.0) for part in pair]
              for pair in prompt.present]  # fmt: skip
    cache: Any = [tuple(tf.reshape(part, [-1, geometry.head_dim]) for part in pair) for pair in padded]
    rows = np.arange(2)
    for index in range(steps):
        position = start + index
        kernels = LoopKernels(geometry, tf.constant(position), cache, tf.constant(width + steps))
        logits = run(model, case.ids[rows, position][:, None].astype(np.int32), position[:, None], kernels)
        difference = max_difference(logits, case.logits[rows, position])
        assert difference < TOLERANCE, (difference, index)
        cache = kernels.present


def test_every_position_of_a_prompt_when_asked() -> None:
    model, case = keras_model("odd_heads"), read_cases("odd_heads")["full"]
    kernels = PromptKernels(model.geometry, None, last=False)
    assert max_difference(run(model, case.ids.astype(np.int32), None, kernels), case.logits) < TOLERANCE


@functools.cache
def served(model: Any) -> ServedWeights:
    return ServedWeights(model, 1)


def run(model: Any, ids: Any, positions: Any, kernels: Any) -> Any:
    kernels.weights = served(model)
    if positions is None:
        positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    return model(tf.constant(ids), position_ids=tf.constant(positions, tf.int32), kernels=kernels)
