"""What a signature refuses: checks that fail with INVALID_ARGUMENT and a sentence."""

from __future__ import annotations

from typing import Any

from builder.frameworks import tf


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
