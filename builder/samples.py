"""Greedy continuations of fixed prompts, to see what a model in training has learned to say."""

from __future__ import annotations

from typing import Any

import numpy as np

from builder.frameworks import ops, tf


def continue_greedily(model: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Return the `count` most likely next tokens of each prompt, one after the other, by whole passes without a cache.

    A prompt has at least one token; one that is too long for the model's positions loses its front.
    """
    length = min(model.geometry.n_positions, max(map(len, prompts)) + count)
    count = min(count, length - 1)
    ids = np.zeros((len(prompts), length), np.int32)
    ends = np.array([min(len(prompt), length - count) for prompt in prompts])
    for row, prompt in enumerate(prompts):
        ids[row, : ends[row]] = prompt[-ends[row] :]

    # One shape for all passes, so one trace: what is right of a token cannot reach it.
    @tf.function  # type: ignore[untyped-decorator]
    def choose(ids: Any, last: Any) -> Any:
        return ops.argmax(tf.gather(model(ids, training=False), last, batch_dims=1), axis=-1)

    for step in range(count):
        ids[np.arange(len(prompts)), ends + step] = choose(tf.constant(ids), tf.constant(ends + step - 1)).numpy()
    return [ids[row, end : end + count].tolist() for row, end in enumerate(ends)]
