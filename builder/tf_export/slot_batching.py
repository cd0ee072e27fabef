"""The batch queue of the slots: a batch function with one thread, so that no two steps ever run at once.

TensorFlow runs a batch with the cancellation of the call that came last into it. A batch whose last caller has given
up is dropped before it starts, or ends after the iteration of its loop that is under way. Its calls then end without
an error as long as nothing reads the outputs of the op. So nothing does: a call reads from the committed state whether
it has what it came for, and enters again if not. Nothing is lost, and no call sees another's deadline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensorflow.core.framework.attr_value_pb2 import AttrValue

from builder.keras_backend import tf

# Batches that may wait; beyond them a call ends with UNAVAILABLE.
_QUEUED = 10_000
_PAUSE = 0.01


def run_in_batch(queue: str, function: Any, rows: Sequence[Any], most: int, wait: float = 0.0) -> Any:
    """Run `function` on `rows`, merged with those of other calls in the same `queue`; return the op, for order.

    Args:
        queue: names the queue within the servable. Ops with the same name share one queue and one thread.
        function: a concrete function of tensors like `rows`, which returns one tensor with the same first axis.
        rows: tensors whose first axes, 1 to `most`, and whose other axes are equal among all calls.
        most: rows that one batch has at most.
        wait: seconds for which a batch that is not full waits for company.
    """
    (output,) = tf.raw_ops.BatchFunction(
        in_tensors=list(rows),
        captured_tensors=function.captured_inputs,
        f=function,
        Tout=[function.outputs[0].dtype],
        num_batch_threads=1,
        max_batch_size=most,
        batch_timeout_micros=int(wait * 1e6),
        max_enqueued_batches=_QUEUED,
        container="",
        shared_name=queue,
        batching_queue=queue,
        enable_large_batch_splitting=False,
    )
    # The op is not declared stateful: without its outputs read, the optimizer would leave it out.
    output.op._set_attr("_grappler_do_not_remove", AttrValue(b=True))
    return output.op


def pause(queue: str) -> Any:
    """Wait 10 ms without a thread or a core; return the op. `queue` as in `run_in_batch`, with a name of its own."""
    spec = [tf.TensorSpec([None], tf.int32)]
    with tf.init_scope():
        function = tf.function(lambda row: row, input_signature=spec, autograph=False).get_concrete_function()
    return run_in_batch(queue, function, [tf.zeros([1], tf.int32)], _QUEUED, _PAUSE)
