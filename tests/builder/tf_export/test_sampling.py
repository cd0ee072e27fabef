"""The graph's sampler is the twin of the host's: the same bits and the same tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from builder.keras_backend import tf
from builder.tf_export.sampling import sample_token, uniform
from serving.sampling import sampler


def numbers(random: np.random.Generator, rows: int) -> tuple[Any, Any]:
    seeds = random.integers(-(2**63), 2**63, rows, dtype=np.int64, endpoint=False)
    return seeds, random.integers(0, 2**31, rows)


@pytest.mark.parametrize("compiled", [False, True])
def test_uniform_is_equal_to_the_bit(compiled: bool) -> None:
    seeds, steps = numbers(np.random.default_rng(0), 100_000)
    edges = np.array([0, 1, 2, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, -1, -(2**63)], np.int64)
    seeds = np.concatenate([seeds, np.repeat(edges, len(edges)), np.arange(1000)])
    steps = np.concatenate([steps, np.tile(edges, len(edges)), np.arange(1000)])
    draw = tf.function(uniform) if compiled else uniform
    ours = draw(tf.constant(seeds, tf.int64), tf.constant(steps, tf.int64)).numpy()
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours.view(np.uint32), sampler.uniform(seeds, steps).view(np.uint32))


def rows_of_parameters(random: np.random.Generator, rows: int, vocab_size: int) -> dict[str, Any]:
    seed, step = numbers(random, rows)
    return {
        "temperature": random.choice([0.0, 1e-30, 0.1, 0.7, 1.0, 1.3, 1000.0], rows).astype(np.float32),
        "top_k": random.choice([0, 1, 2, 7, vocab_size - 1, vocab_size, 3 * vocab_size, 2**31 - 1], rows),
        "top_p": random.choice([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0], rows).astype(np.float32),
        "seed": seed,
        "step": step,
    }


def in_graph(logits: Any, temperature: Any, top_k: Any, top_p: Any, seed: Any, step: Any) -> Any:
    columns = [(temperature, tf.float32), (top_k, tf.int32), (top_p, tf.float32), (seed, tf.int64), (step, tf.int64)]
    return tf.function(sample_token)(tf.constant(logits), *[tf.constant(value, dtype) for value, dtype in columns])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("vocab_size", [2, 31, 1000])
def test_choices_are_equal(vocab_size: int, ties: bool) -> None:
    random = np.random.default_rng(vocab_size)
    rows = 2000 if vocab_size < 1000 else 500
    logits = 3 * random.standard_normal((rows, vocab_size)).astype(np.float32)
    if ties:
        logits = np.round(logits)
        logits[logits == 0] = random.choice([0.0, -0.0], int((logits == 0).sum()))
    parameters = rows_of_parameters(random, rows, vocab_size)
    chosen = in_graph(logits, **parameters)
    assert chosen.dtype == tf.int32
    wanted = sampler.sample_tokens(logits, **parameters)
    different = np.flatnonzero(chosen.numpy() != wanted)
    assert not different.size, (different[:5], {key: value[different[:5]] for key, value in parameters.items()})
    assert len(np.unique(wanted)) > 1


def test_greedy_takes_the_lowest_id_among_equals_with_or_without_sampled_neighbours() -> None:
    logits = np.array([[1, 5, 5, 2], [5, 5, 0, 0], [-1, -1, -1, -1]], np.float32)
    rest = {"top_k": [0, 0, 0], "top_p": [1.0] * 3, "seed": [1, 2, 3], "step": [0, 0, 0]}
    assert in_graph(logits, temperature=[0.0, 0.0, 0.0], **rest).numpy().tolist() == [1, 0, 0]
    assert in_graph(logits, temperature=[0.0, 0.0, 5.0], **rest).numpy().tolist()[:2] == [1, 0]


def test_a_draw_on_a_border_falls_to_the_right_of_it() -> None:
    half, zero = 24011979, 1005731
    assert sampler.uniform([half, zero], 0).tolist() == [0.5, 0.0]
    parameters = {"temperature": [1.0] * 2, "top_k": [0] * 2, "top_p": [1.0] * 2, "seed": [half, zero], "step": [0] * 2}
    logits = np.zeros((2, 4), np.float32)
    assert sampler.sample_tokens(logits, **parameters).tolist() == [2, 0]
    assert in_graph(logits, **parameters).numpy().tolist() == [2, 0]


def test_rows_are_independent() -> None:
    random = np.random.default_rng(5)
    logits = random.standard_normal((40, 50)).astype(np.float32)
    parameters = rows_of_parameters(random, 40, 50)
    together = in_graph(logits, **parameters).numpy()
    for start in range(0, 40, 3):
        part = slice(start, start + 3)
        alone = in_graph(logits[part], **{key: value[part] for key, value in parameters.items()}).numpy()
        assert alone.tolist() == together[part].tolist()
