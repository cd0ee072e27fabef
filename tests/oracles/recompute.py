"""Generation by its definition: one row, no cache, the whole text again for every token."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from serving.sampling import sample_tokens
from tests.oracles.fixtures import keras_model


@functools.cache
def last_logits(name: str) -> Callable[[Sequence[int]], Any]:
    """A function from the ids of a text to the Keras logits [1, vocab_size] after it."""
    from builder.keras_backend import tf

    model = keras_model(name)
    width = model.geometry.n_positions
    # Of one fixed width, so that it is traced once; what follows a token cannot change its logits.
    forward = tf.function(model, autograph=False)

    def logits(ids: Sequence[int]) -> Any:
        padded = np.zeros((1, width), np.int32)
        padded[0, : len(ids)] = ids
        return forward(padded).numpy()[:, len(ids) - 1]

    return logits


def generate(
    name: str,
    prompt: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[int]:
    """What the fixture `name` continues `prompt` by, the end token included."""
    geometry = keras_model(name).geometry
    tokens = list(prompt)
    while len(tokens) < min(geometry.n_positions, len(prompt) + max_new_tokens):
        step = len(tokens) - len(prompt)
        (token,) = sample_tokens(last_logits(name)(tokens), temperature, top_k, top_p, seed, step).tolist()
        tokens.append(token)
        if token == geometry.eos_token_id:
            break
    return tokens[len(prompt) :]
