"""The keys and values of all slots: variables that are as large as the longest active text needs, written in place."""

from __future__ import annotations

from typing import Any

from builder.keras_backend import tf
from builder.tf_export.kernels import Cache
from serving.bundle import Geometry

# Positions that the cache grows by, as in the generation loop: it is attended to its end.
_BLOCK = 64


class SlotCache(tf.Module):  # type: ignore[misc]
    """Per block a key and a value tensor [slots * n_head * capacity, head_dim], float32.

    The capacity, positions a slot, is the tensors' own size. They are empty in the checkpoint and grow with use.
    """

    def __init__(self, geometry: Geometry, count: int) -> None:
        super().__init__(name="slot_cache")
        self.geometry, self.heads = geometry, count * geometry.n_head
        width = geometry.head_dim
        self.tensors = [
            tf.Variable(tf.zeros([0, width]), trainable=False, shape=tf.TensorShape([None, width]))
            for _ in range(2 * geometry.n_layer)
        ]

    def fit(self, need: Any) -> Any:
        """Make room for `need` positions a slot, in whole blocks; return the capacity.

        What a slot holds at a position from `need` on may be gone.
        """
        wanted = tf.minimum((need + _BLOCK - 1) // _BLOCK * _BLOCK, self.geometry.n_positions)
        held = [tf.raw_ops.VariableShape(input=variable.handle)[0] // self.heads for variable in self.tensors]
        # All are looked at, since a call that failed for lack of memory may have left them unequal.
        smallest, largest = tf.reduce_min(tf.stack(held)), tf.reduce_max(tf.stack(held))
        fits = (smallest == largest) & (wanted <= smallest) & (largest <= 2 * wanted)

        def resize() -> Any:
            previous: list[Any] = []
            for variable, capacity in zip(self.tensors, held, strict=True):
                # One after another, so that no more than one of them is there twice.
                with tf.control_dependencies(previous):
                    past = tf.reshape(variable.read_value(), [self.heads, capacity, self.geometry.head_dim])
                    room = tf.maximum(wanted - capacity, 0)
                    resized = tf.pad(past[:, :wanted], [[0, 0], [0, room], [0, 0]])
                    previous = [variable.assign(tf.reshape(resized, [-1, self.geometry.head_dim]))]
            return tf.identity(wanted)

        return tf.cond(fits, lambda: tf.identity(smallest), resize)

    def read(self) -> Cache:
        """The tensors: the variables' memory itself and no copy, so that an in-place op on them changes it."""
        tensors = [variable.read_value() for variable in self.tensors]
        return list(zip(tensors[::2], tensors[1::2], strict=True))

    def store(self, present: Cache, slots: Any, width: Any, need: Any) -> None:
        """Write the first `width` positions of `slots` [rows]; `present` is per block [rows, n_head, width, head_dim].

        `need`, at least `width`, is how many positions are kept of every slot.
        """
        capacity = self.fit(need)
        with tf.control_dependencies([capacity]):
            cache = self.read()
        heads = slots[:, None] * self.geometry.n_head + tf.range(self.geometry.n_head)
        lines = tf.reshape(heads[:, :, None] * capacity + tf.range(width), [-1])
        past = [tensor for pair in cache for tensor in pair]
        new = [tf.reshape(tensor, [-1, self.geometry.head_dim]) for pair in present for tensor in pair]
        for variable, tensor, values in zip(self.tensors, past, new, strict=True):
            # It is written where it lies; the assignment keeps the op alive, whose output nothing else needs.
            variable.assign(tf.raw_ops.InplaceUpdate(x=tensor, i=lines, v=values))
