"""What a signature refuses: checks that fail with INVALID_ARGUMENT and a sentence."""

from __future__ import annotations

from typing import Any

from builder.keras_backend import tf
from serving.bundle import Geometry


def after(checks: list[Any], *tensors: Any) -> list[Any]:
    """The tensors, but not before the checks have passed: else an op that fails on them may be heard first."""
    with tf.control_dependencies(checks):
        return [tf.identity(tensor) for tensor in tensors]


def check_all(condition: Any, message: str) -> Any:
    """Check that every element of `condition` is True."""
    return tf.debugging.Assert(tf.reduce_all(condition), [message])


def check_rows(rows_of: str, first: Any, **tensors: Any) -> list[Any]:
    """Check that each tensor has as many rows as `first`, the input `rows_of`; one row would be spread unasked."""
    rows = tf.shape(first)[0]
    return [
        tf.debugging.assert_equal(tf.shape(tensor)[0], rows, f"{name} must have one value for each row of {rows_of}")
        for name, tensor in tensors.items()
    ]


def check_ids(token_ids: Any, vocab_size: int) -> Any:
    """Check that all ids, those of padding too, are of the vocabulary."""
    return check_all(
        (token_ids >= 0) & (token_ids < vocab_size), f"token_ids must be from 0 to {vocab_size - 1}, padding included"
    )


def check_prompt(geometry: Geometry, token_ids: Any, lengths: Any) -> list[Any]:
    """Check right-padded prompts: ids of the vocabulary, not empty, not longer than the context."""
    width, limit = tf.shape(token_ids)[1], geometry.n_positions
    return [
        check_ids(token_ids, geometry.vocab_size),
        tf.debugging.assert_less_equal(width, limit, f"the prompt is longer than the context of {limit} tokens"),
        *check_rows("token_ids", token_ids, lengths=lengths),
        tf.debugging.assert_greater_equal(lengths, 1, "lengths must be at least 1: a prompt may not be empty"),
        tf.debugging.assert_less_equal(lengths, width, "lengths must not pass the end of token_ids"),
    ]


def check_parameters(token_ids: Any, max_new_tokens: Any, temperature: Any, top_k: Any, top_p: Any, seed: Any) -> Any:
    """Check what says how each row of `token_ids` is continued."""
    return [
        *check_rows(
            "token_ids",
            token_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        ),
        tf.debugging.assert_greater_equal(max_new_tokens, 1, "max_new_tokens must be at least 1"),
        check_all(
            tf.math.is_finite(temperature) & (temperature >= 0), "temperature must be a finite number, 0 or more"
        ),
        tf.debugging.assert_greater_equal(top_k, 0, "top_k must be 0 (off) or more"),
        check_all((top_p > 0) & (top_p <= 1), "top_p must be above 0 and at most 1"),
    ]
