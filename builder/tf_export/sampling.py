"""Samples the next token inside a TensorFlow graph, by the same operations as `serving.sampling.sample_tokens`.

It takes what the signatures take: temperature, top-k and top-p. Min-p, penalties and bias are the host's alone.

Both sides draw from the same counter-based random number, so a seed gives the same tokens in the graph and on the
host. Only core TensorFlow ops are used, and every row depends on its own inputs alone.
"""

from __future__ import annotations

from typing import Any

from builder.keras_backend import tf

_MASK32 = 0xFFFFFFFF


def _mix(bits: Any) -> Any:
    """The lowbias32 hash of 32-bit values held in int64 (Wellons, "Prospecting for Hash Functions", 2018).

    A product may wrap around 64 bits and turn negative; its low 32 bits, all that the mask keeps, are right anyway.
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = tf.bitwise.bitwise_xor(bits, tf.bitwise.right_shift(bits, tf.constant(shift, tf.int64)))
        bits = tf.bitwise.bitwise_and(bits * tf.constant(factor, tf.int64), tf.constant(_MASK32, tf.int64))
    return tf.bitwise.bitwise_xor(bits, tf.bitwise.right_shift(bits, tf.constant(16, tf.int64)))


def uniform(seed: Any, step: Any) -> Any:
    """Return [rows] float32 in [0, 1) from `seed` [rows] int64 and `step` [rows] int64, as the host does."""
    mask, half = tf.constant(_MASK32, tf.int64), tf.constant(32, tf.int64)
    low = tf.bitwise.bitwise_and(seed, mask)
    high = tf.bitwise.bitwise_and(tf.bitwise.right_shift(seed, half), mask)
    counter = tf.bitwise.bitwise_and(step + tf.constant(0x9E3779B9, tf.int64), mask)
    bits = _mix(tf.bitwise.bitwise_xor(low, _mix(tf.bitwise.bitwise_xor(high, _mix(counter)))))
    return tf.cast(tf.bitwise.right_shift(bits, tf.constant(8, tf.int64)), tf.float32) * (2.0**-24)


def sample_token(logits: Any, temperature: Any, top_k: Any, top_p: Any, seed: Any, step: Any) -> Any:
    """Return the next token id of each row, [rows] int32.

    Args:
        logits: [rows, vocab_size] float32.
        temperature: [rows] float32; 0 takes the largest logit (the lowest id among equals).
        top_k: [rows] int32; 0 keeps every token.
        top_p: [rows] float32 in (0, 1]; 1 keeps every token.
        seed: [rows] int64.
        step: [rows] int64, how many tokens the row has generated so far.
    """
    greedy = tf.argmax(logits, axis=-1, output_type=tf.int32)
    sampling = temperature > 0
    return tf.cond(
        tf.reduce_any(sampling),
        lambda: tf.where(sampling, _sample(logits, temperature, top_k, top_p, uniform(seed, step)), greedy),
        lambda: greedy,
    )


def _sample(logits: Any, temperature: Any, top_k: Any, top_p: Any, draw: Any) -> Any:
    vocab_size = tf.shape(logits)[1]
    values, order = tf.math.top_k(logits, k=vocab_size, sorted=True)
    safe = tf.where(temperature > 0, temperature, tf.ones_like(temperature))[:, None]
    kept = tf.where(top_k > 0, tf.minimum(top_k, vocab_size), vocab_size)
    in_top_k = tf.range(vocab_size)[None, :] < kept[:, None]
    weights = tf.where(in_top_k, tf.exp((values - values[:, :1]) / safe), 0.0)
    sums = tf.cumsum(tf.cast(weights, tf.float64), axis=-1)
    reach = tf.cast(top_p, tf.float64)[:, None] * sums[:, -1:]
    last = tf.reduce_sum(tf.cast(sums[:, :-1] < reach, tf.int32), axis=-1)
    total = tf.gather(sums, last, batch_dims=1)
    chosen = tf.reduce_sum(tf.cast(sums <= (tf.cast(draw, tf.float64) * total)[:, None], tf.int32), axis=-1)
    return tf.gather(order, tf.minimum(chosen, last), batch_dims=1)
