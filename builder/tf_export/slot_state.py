"""What the slots hold between calls: one record that a step commits by one assignment, and marks that any call may set.

A reader outside the steps sees one committed record, whole. Generations only rise, so a mark that names a generation
or a request can be set at any time: it never hits a later tenant.
"""

from __future__ import annotations

from typing import Any

from builder.keras_backend import tf

FIELDS = (
    "request_id",
    "generation",
    "active",
    "length",
    "made",
    "budget",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "owned",
    "absent",
)
_FLOATS = ("temperature", "top_p")
_SECOND = 1_000_000
# Requests that are remembered as cancelled, or as waiting, each in the place that its id's low bits name.
_REMEMBERED = 1024
# A whole answer's call enters every step. One that missed this many, for this long, was abandoned.
_STEPS_ABSENT, _SECONDS_ABSENT = 4, 0.5

State = dict[str, Any]


class SlotState(tf.Module):  # type: ignore[misc]
    """The record [slots, fields and n_positions tokens] int64, and the marks [slots] int64.

    Args:
        count: slots.
        positions: tokens that a slot can hold.
        lease: seconds after which a slot that no call has asked for may be given away.
    """

    def __init__(self, count: int, positions: int, lease: float) -> None:
        super().__init__(name="slot_state")
        self.count, self.lease = count, int(lease * _SECOND)
        with tf.device("/device:CPU:0"):
            self.record = _integers([count, len(FIELDS) + positions])
            self.released, self.touched = _integers([count]), _integers([count])
            self.cancelled, self.newest = _integers([_REMEMBERED]), _integers([1])
            self.line = _integers([_REMEMBERED, 2])

    def read(self) -> State:
        """The committed state: FIELDS [slots], `tokens` [slots, n_positions] int64, and `occupied`, `idle` bool."""
        record = self.record.read_value()
        state: State = {name: record[:, column] for column, name in enumerate(FIELDS)}
        for name in _FLOATS:
            state[name] = tf.bitcast(tf.cast(state[name], tf.int32), tf.float32)
        state["tokens"] = record[:, len(FIELDS) :]
        given_back = (state["generation"] <= self.released.read_value()) | self.is_cancelled(state["request_id"])
        state["occupied"], owned = ~given_back, state["owned"] > 0
        state["active"] = (state["active"] > 0) & state["occupied"]
        unasked = now() - self.touched.read_value()
        given_up = (state["absent"] >= _STEPS_ABSENT) & (unasked >= int(_SECONDS_ABSENT * _SECOND))
        state["idle"] = tf.where(owned, given_up, unasked >= self.lease)
        return state

    def commit(self, state: State) -> Any:
        """Write FIELDS and `tokens` of `state`, all at once."""
        columns = [
            tf.cast(tf.bitcast(state[name], tf.int32) if name in _FLOATS else state[name], tf.int64) for name in FIELDS
        ]
        return self.record.assign(tf.concat([tf.stack(columns, axis=1), state["tokens"]], axis=1))

    def touch(self, slot: Any, condition: Any) -> Any:
        """Note that the slots [rows] with `condition` [rows] are asked for now."""
        places = tf.boolean_mask(slot, condition)
        return self.touched.scatter_max(tf.IndexedSlices(tf.fill(tf.shape(places), now()), places))

    def release(self, slot: Any, generation: Any, condition: Any) -> Any:
        """Give the slots [rows] back for which `condition` [rows] holds, if they still hold `generation` [rows]."""
        places, generation = tf.boolean_mask(slot, condition), tf.boolean_mask(generation, condition)
        return self.released.scatter_max(tf.IndexedSlices(generation, places))

    def cancel(self, request_id: Any) -> Any:
        """Give back whatever slots the requests [rows] have or may yet get."""
        noted = self.cancelled.scatter_update(tf.IndexedSlices(request_id, request_id % _REMEMBERED))
        with tf.control_dependencies([noted]):
            state = self.read()
        held = tf.reduce_any(request_id[:, None] == state["request_id"], axis=0)
        return self.release(tf.range(self.count), state["generation"], held)

    def settle(self, state: State) -> Any:
        """Give back for good what is not occupied: a request may be forgotten to have been cancelled."""
        return self.release(tf.range(self.count), state["generation"], ~state["occupied"])

    def is_cancelled(self, request_id: Any) -> Any:
        """Whether each request [rows] was cancelled."""
        return (tf.gather(self.cancelled, request_id % _REMEMBERED) == request_id) & (request_id != 0)

    def place_in_line(self, request_id: Any) -> Any:
        """When each request [rows] asked for a slot first, as far as is remembered."""
        place = request_id % _REMEMBERED
        known = tf.gather(self.line.read_value(), place)
        arrived = tf.where(known[:, 0] == request_id, known[:, 1], now())
        noted = self.line.scatter_update(tf.IndexedSlices(tf.stack([request_id, arrived], axis=1), place))
        with tf.control_dependencies([noted]):
            return tf.identity(arrived)

    def usable(self, state: State) -> Any:
        """Which slots [slots] a prompt may take."""
        return ~state["occupied"] | state["idle"]

    def find(self, state: State, request_id: Any) -> tuple[Any, Any]:
        """Whether each request [rows] has a slot, and which, [rows] int32."""
        same = state["occupied"] & (request_id[:, None] == state["request_id"])
        return tf.reduce_any(same, axis=1), tf.argmax(tf.cast(same, tf.int32), axis=1, output_type=tf.int32)

    def named(self, slot: Any, condition: Any) -> Any:
        """Which slots [slots] some row with `condition` [rows] names in `slot` [rows]."""
        return tf.reduce_any(condition[:, None] & (slot[:, None] == tf.range(self.count)), axis=0)


def now() -> Any:
    """Microseconds of the clock, a scalar int64."""
    return tf.cast(tf.timestamp() * _SECOND, tf.int64)


def _integers(shape: list[int]) -> Any:
    return tf.Variable(tf.zeros(shape, tf.int64), trainable=False)
