"""Whole answers by slots: prompts of one call that share every step with all other calls.

A row takes a slot as a stream's prompt does, but its slot belongs to the call: it is given back as soon as the row has
ended, and soon after the call has been given up. Rows that find no slot wait their turn.
"""

from __future__ import annotations

from typing import Any

from builder.keras_backend import tf
from builder.tf_export.slot_step import MOST_ROWS, SlotStep


def continue_rows(
    step: SlotStep, token_ids: Any, lengths: Any, max_new_tokens: Any, sampling: tuple[Any, ...]
) -> dict[str, Any]:
    """Continue prompts [batch, width] that have been checked; return `token_ids` [batch, longest] and `lengths`."""
    state_of = step.state
    # Seeds of 0 draw other numbers in each session and signature.
    request_id = tf.raw_ops.RandomUniformInt(
        shape=tf.shape(lengths),
        minval=tf.constant(1, tf.int64),
        maxval=tf.constant(2**63 - 1, tf.int64),
        seed=0,
        seed2=0,
    )
    wishes, prompts = step.prompts(request_id, token_ids, lengths, max_new_tokens, sampling, owned=True)
    budget = wishes["budget"]
    width = tf.maximum(tf.reduce_max(budget), 0)

    def turn(done: Any, made: Any, output: Any) -> Any:
        before = state_of.read()
        has, _ = state_of.find(before, request_id)
        # Those that have a slot first: they must not miss a step.
        order = tf.argsort(tf.where(done, 2, tf.where(has, 0, 1)), stable=True)
        rows = tf.boolean_mask(order, tf.gather(~done, order))[:MOST_ROWS]
        with tf.control_dependencies([step.for_prompts(wishes, prompts, rows)]):
            state = state_of.read()
        with tf.control_dependencies([step.pause_if_idle(before, state)]):
            has, slot = state_of.find(state, request_id)
        ended = ~done & has & ~tf.gather(state["active"], slot)
        tokens = tf.cast(tf.gather(state["tokens"][:, :width], slot), tf.int32)
        output = tf.where(ended[:, None], tokens, output)
        made = tf.where(ended, tf.cast(tf.gather(state["made"], slot), tf.int32), made)
        touched = state_of.touch(slot, has)
        released = state_of.release(slot, tf.gather(state["generation"], slot), ended)
        with tf.control_dependencies([touched, released]):
            return done | ended, made, tf.identity(output)

    start = (budget <= 0, tf.zeros_like(lengths), tf.zeros([tf.size(lengths), width], tf.int32))
    shapes = (tf.TensorShape([None]), tf.TensorShape([None]), tf.TensorShape([None, None]))
    _, made, output = tf.while_loop(lambda done, *_: tf.reduce_any(~done), turn, start, shape_invariants=shapes)
    output = output[:, : tf.maximum(tf.reduce_max(made), 0)]
    inside = tf.range(tf.shape(output)[1]) < made[:, None]
    return {"token_ids": tf.where(inside, output, step.geometry.eos_token_id), "lengths": made}
