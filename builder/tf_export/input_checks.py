"""What a signature refuses: checks that fail with INVALID_ARGUMENT and a sentence."""

from __future__ import annotations

from typing import Any

from builder.keras_backend import tf
from serving.bundle import Geometry
from serving.sampling.parameters import MAX_SEED

SAMPLING = ("temperature", "top_k", "top_p", "seed")
PARAMETERS = ("max_new_tokens", *SAMPLING)
"""What a request says of each row, in the order of the signatures' inputs."""


def after(checks: list[Any], *tensors: Any) -> list[Any]:
    """The tensors, but not before the checks have passed: else an op that fails on them may be heard first."""
    with tf.control_dependencies(checks):
        return [tf.identity(tensor) for tensor in tensors]


def check_all(condition: Any, message: str) -> Any:
    """Check that every element of `condition` is True."""
    return tf.debugging.Assert(tf.reduce_all(condition), [message])


def check_ranks(**tensors: tuple[Any, int]) -> list[Any]:
    """The tensors, but after a check that each has the given number of axes.

    A server feeds a session what a client has sent, whatever shape the signature declares.
    """
    checks = []
    for name, (tensor, rank) in tensors.items():
        # The optimizer takes the declared number of axes for a fact. It knows nothing of what comes out of bytes.
        shape = tf.io.parse_tensor(tf.io.serialize_tensor(tf.shape(tensor)), tf.int32)
        axes = "1 axis" if rank == 1 else f"{rank} axes"
        checks.append(check_all(tf.size(shape) == rank, f"{name} must have {axes}"))
    return after(checks, *[tensor for tensor, _ in tensors.values()])


def parameter_ranks(*parameters: Any) -> dict[str, tuple[Any, int]]:
    """The generation parameters as `check_ranks` takes them: in the order of `PARAMETERS`, one value a row."""
    return {name: (value, 1) for name, value in zip(PARAMETERS, parameters, strict=True)}


def check_rows(rows_of: str, first: Any, **tensors: Any) -> list[Any]:
    """Check that each tensor has as many rows as `first`, the input `rows_of`; one row would be spread unasked."""
    rows = tf.shape(first)[0]
    return [
        check_all(tf.shape(tensor)[0] == rows, f"{name} must have one value for each row of {rows_of}")
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
        check_all(width <= limit, f"the prompt is longer than the context of {limit} tokens"),
        *check_rows("token_ids", token_ids, lengths=lengths),
        check_all(lengths >= 1, "lengths must be at least 1: a prompt may not be empty"),
        check_all(lengths <= width, "lengths must not pass the end of token_ids"),
    ]


def check_parameters(rows_of: str, rows: Any, *parameters: Any) -> list[Any]:
    """Check the generation parameters, in the order of `PARAMETERS`, of each row of `rows`, the input `rows_of`."""
    max_new_tokens, temperature, top_k, top_p, seed = parameters
    return [
        *check_rows(rows_of, rows, **dict(zip(PARAMETERS, parameters, strict=True))),
        check_all(max_new_tokens >= 1, "max_new_tokens must be at least 1"),
        check_all(
            tf.math.is_finite(temperature) & (temperature >= 0), "temperature must be a finite number, 0 or more"
        ),
        check_all(top_k >= 0, "top_k must be 0 (off) or more"),
        check_all((top_p > 0) & (top_p <= 1), "top_p must be above 0 and at most 1"),
        check_all(seed >= 0, f"seed must be from 0 to {MAX_SEED}"),
    ]
