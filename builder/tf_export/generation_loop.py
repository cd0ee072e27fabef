"""Whole answers without slots: a loop of one call's own, over a cache that it alone knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from builder.keras_backend import tf
from builder.tf_export.kernels import Cache, LoopKernels, PromptKernels
from builder.tf_export.sampling import sample_token
from serving.bundle import Geometry

# Positions that the loop's cache grows by: it is copied once per this many tokens, and attended to its end.
_BLOCK = 64


def generation_loop(
    geometry: Geometry,
    run: Callable[[Any, Any, Any], Any],
    token_ids: Any,
    lengths: Any,
    max_new_tokens: Any,
    sampling: tuple[Any, Any, Any, Any],
) -> dict[str, Any]:
    """Continue prompts [batch, width] that have been checked; return `token_ids` [batch, longest] and `lengths`.

    `run` is from (token_ids [rows, sequence], position_ids or None, kernels) to logits.
    """
    budget = tf.minimum(max_new_tokens, geometry.n_positions - lengths)
    steps = tf.maximum(tf.reduce_max(budget), 0)
    end = tf.constant(geometry.eos_token_id, tf.int32)

    prompt = PromptKernels(geometry, lengths, last=True)
    logits = run(token_ids, None, prompt)
    batch, width = tf.shape(token_ids)[0], tf.shape(token_ids)[1]

    def body(step: Any, logits: Any, active: Any, made: Any, output: Any, cache: Cache, capacity: Any) -> Any:
        count = tf.fill([batch], tf.cast(step, tf.int64))
        token = tf.where(active, sample_token(logits, *sampling, count), end)
        output = tf.tensor_scatter_nd_update(output, [[step]], token[None])
        made += tf.cast(active, tf.int32)
        active = active & (token != end) & (made < budget)

        def advance() -> Any:
            # A row that has ended may stand at the last position; its token is not used, so the clip is safe.
            positions = tf.minimum(lengths + step, geometry.n_positions - 1)
            kernels = LoopKernels(geometry, positions, cache, capacity)
            return run(token[:, None], positions[:, None], kernels), kernels.present

        logits, cache = tf.cond(tf.reduce_any(active), advance, lambda: (logits, cache))
        return step + 1, logits, active, made, output, cache, capacity

    def unfinished(step: Any, logits: Any, active: Any, *rest: Any) -> Any:
        return (step < steps) & tf.reduce_any(active)

    def has_room(step: Any, logits: Any, active: Any, made: Any, output: Any, cache: Cache, capacity: Any) -> Any:
        return unfinished(step, logits, active) & (width + step < capacity)

    def block(*state: Any) -> Any:
        *others, cache, capacity = state
        room = tf.minimum(_BLOCK, width + steps - capacity)
        return tf.while_loop(has_room, body, (*others, grow(cache, capacity, room), capacity + room))

    def grow(cache: Cache, capacity: Any, room: Any) -> Cache:
        shape = [batch * geometry.n_head, capacity, geometry.head_dim]
        return [
            tuple(
                tf.reshape(tf.pad(tf.reshape(part, shape), [[0, 0], [0, room], [0, 0]]), [-1, geometry.head_dim])
                for part in pair
            )
            for pair in cache
        ]

    state = (
        tf.constant(0),
        logits,
        budget > 0,
        tf.zeros([batch], tf.int32),
        tf.fill([steps, batch], end),
        [tuple(tf.reshape(part, [-1, geometry.head_dim]) for part in pair) for pair in prompt.present],
        width,
    )
    longest, _, _, made, output, *_ = tf.while_loop(unfinished, block, state)
    return {"token_ids": tf.transpose(output[:longest]), "lengths": made}
