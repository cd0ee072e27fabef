"""Greedy continuations of fixed prompts, to see what a model in training has learned to say."""

from __future__ import annotations

from typing import Any

import numpy as np

from builder.keras_backend import ops, tf


class Continuations:
    """Calls give the most likely next tokens of each prompt, one after the other, by whole passes without a cache.

    Args:
        model: a GPT-2, whose weights may change between two calls.
        prompts: ids, at least one each; one that is too long for the model's positions loses its front.
        count: new tokens, at most one fewer than the model's positions.
    """

    def __init__(self, model: Any, prompts: list[list[int]], count: int) -> None:
        length = min(model.geometry.n_positions, max(map(len, prompts), default=0) + count)
        self.count = min(count, length - 1)
        self.ends = np.array([min(len(prompt), length - self.count) for prompt in prompts], np.int32)
        self.ids = np.zeros((len(prompts), length), np.int32)
        for row, (prompt, end) in enumerate(zip(prompts, self.ends, strict=True)):
            self.ids[row, :end] = prompt[-end:]

        # One shape for all passes, so one trace: a token cannot attend to those after it.
        @tf.function  # type: ignore[untyped-decorator]
        def choose(ids: Any, last: Any) -> Any:
            return ops.argmax(tf.gather(model(ids, training=False), last, batch_dims=1), axis=-1)

        self._choose = choose

    def __call__(self) -> list[list[int]]:
        ids, ends = self.ids.copy(), self.ends
        if not len(ids):
            return []
        for step in range(self.count):
            chosen = self._choose(tf.constant(ids), tf.constant(ends + step - 1))
            ids[np.arange(len(ids)), ends + step] = chosen.numpy()
        return [row[end : end + self.count].tolist() for row, end in zip(ids, ends, strict=True)]
