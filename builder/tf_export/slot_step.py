"""What runs within the batch queue of the slots: prompts take slots, and active slots advance together, step by step.

A batch has wishes, one a row: for a prompt to get a slot, or for a slot to reach a number of tokens. Wishes name what
they are for (a request, or a slot's generation), so that the same one may come twice, in one batch or in several.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensorflow.core.framework.attr_value_pb2 import AttrValue

from builder.keras_backend import tf
from builder.tf_export.input_checks import SAMPLING
from builder.tf_export.sampling import sample_token
from builder.tf_export.slot_batching import pause, run_in_batch
from builder.tf_export.slot_cache import SlotCache
from builder.tf_export.slot_model import SlotModel
from builder.tf_export.slot_state import SlotState, State, now
from serving.bundle import Geometry

# A wish, [columns] int64. One for a prompt has its length and no generation, one for tokens has `made` to reach.
_WISH = ("request_id", "slot", "generation", "made", "entered", "arrived", "length", "budget", "owned", "top_k", "seed")
_FLOATS = ("temperature", "top_p")
_FOR_PROMPTS = ("length", "budget", "owned", *SAMPLING)
# Rows that one batch has at most; a call of more enters with some of them at a time.
MOST_ROWS = 64
# Steps of one batch at most. It ends sooner when a wish is fulfilled or another call has entered the queue.
_STEPS = 16
# Padded tokens of the prompts that one batch runs, unless the first has more; and tokens of padding among them.
_PROMPT_TOKENS, _PADDING = 2048, 128
# Steps for which a whole answer's slot continues without its call, which may be on its way back to the queue.
_STEPS_AHEAD = 2
_NEVER = 2**62


class SlotStep(tf.Module):  # type: ignore[misc]
    """The function that the batch queue runs, and the calls into it.

    Args:
        queue: names the batch queue within the servable.
        run: from (token_ids [rows, sequence], position_ids or None, kernels) to logits.
    """

    def __init__(self, queue: str, geometry: Geometry, state: SlotState, run: Callable[[Any, Any, Any], Any]) -> None:
        super().__init__(name="slot_step")
        self._queue, self.geometry, self.state = queue, geometry, state
        self.model = SlotModel(geometry, run)
        self.cache = SlotCache(geometry, state.count)
        self._function: Any = None

    def prompts(
        self, request_id: Any, token_ids: Any, lengths: Any, max_new_tokens: Any, sampling: Any, *, owned: bool
    ) -> tuple[State, Any]:
        """The wishes of prompts [batch] that have been checked, and their tokens [batch, n_positions].

        Slots that are `owned` belong to a call that enters every step.
        """
        limit = self.geometry.n_positions
        arrived = tf.fill(tf.shape(request_id), now()) if owned else self.state.place_in_line(request_id)
        wishes = dict(zip(SAMPLING, sampling, strict=True)) | {
            "request_id": request_id,
            "arrived": arrived,
            "length": lengths,
            "budget": tf.minimum(max_new_tokens, limit - lengths),
            "owned": tf.fill(tf.shape(request_id), int(owned)),
        }
        return wishes, tf.pad(token_ids, [[0, 0], [0, limit - tf.shape(token_ids)[1]]])

    def for_prompts(self, wishes: State, token_ids: Any, rows: Any) -> Any:
        """Enter with the prompts `rows` [some]; return the op.

        `wishes` and `token_ids` are those of `prompts`.
        """
        return self._enter({name: tf.gather(value, rows) for name, value in wishes.items()}, tf.gather(token_ids, rows))

    def for_tokens(self, slot: Any, generation: Any, made: Any, rows: Any) -> Any:
        """Enter until the slots of `rows` [some] have `made` tokens; the others are [batch]. Return the op."""
        wishes = {"slot": slot, "generation": generation, "made": made}
        none = tf.zeros([tf.size(rows), self.geometry.n_positions], tf.int32)
        return self._enter({name: tf.gather(value, rows) for name, value in wishes.items()}, none)

    def pause_if_idle(self, before: State, after: State) -> Any:
        """Wait a little if nothing moved from one state to the other, and no slot is free; return a tensor, for order.

        A prompt that waits for a slot would else come back at once, again and again.
        """
        moved = (before["made"] != after["made"]) | (before["generation"] != after["generation"])
        return tf.cond(
            tf.reduce_any(moved | self.state.usable(after)),
            lambda: tf.constant(0),
            lambda: _after(pause(f"{self._queue}/pause")),
        )

    def _enter(self, wishes: State, token_ids: Any) -> Any:
        if self._function is None:
            specs = [
                tf.TensorSpec([None, len(_WISH)], tf.int64),
                tf.TensorSpec([None, len(_FLOATS)], tf.float32),
                tf.TensorSpec([None, self.geometry.n_positions], tf.int32),
            ]
            with tf.init_scope():
                function = tf.function(self._step, input_signature=specs, autograph=False)
                self._function = function.get_concrete_function()
        some, entered = tf.shape(token_ids)[0], now()
        wishes = wishes | {"entered": tf.fill([some], entered)}
        whole = [tf.cast(wishes[name], tf.int64) if name in wishes else tf.zeros([some], tf.int64) for name in _WISH]
        parts = [wishes.get(name, tf.zeros([some])) for name in _FLOATS]
        told = self.state.newest.scatter_max(tf.IndexedSlices(entered[None], tf.constant([0])))
        with tf.control_dependencies([told]):
            rows = [tf.stack(whole, axis=1), tf.stack(parts, axis=1), token_ids]
            return run_in_batch(self._queue, self._function, rows, MOST_ROWS)

    def _step(self, whole: Any, parts: Any, token_ids: Any) -> Any:
        wishes = {name: whole[:, column] for column, name in enumerate(_WISH)}
        wishes |= {name: parts[:, column] for column, name in enumerate(_FLOATS)}
        slot = tf.cast(wishes["slot"], tf.int32)
        before, newest = self.state.read(), tf.reduce_max(wishes["entered"])
        state = dict(before)
        prompts = wishes["length"] > 0
        current = ~prompts & tf.gather(state["occupied"], slot)
        current &= tf.gather(state["generation"], slot) == wishes["generation"]

        asked = self.state.named(slot, current)
        state["absent"] = tf.where(asked, tf.zeros_like(state["absent"]), state["absent"] + 1)
        state, slot, left = self._take_prompts(state, wishes, token_ids, prompts, tf.where(current, slot, -1), asked)
        with tf.control_dependencies([self.state.settle(before)]):
            committed = self.state.commit(state)

        # What the wishes for each slot wait for; a prompt of a stream for no more than its slot.
        goal = tf.where(prompts, tf.where(wishes["owned"] > 0, wishes["budget"], 0), wishes["made"])
        goal = tf.math.unsorted_segment_min(goal, slot, self.state.count)
        asked = self.state.named(slot, slot >= 0)
        # A wish for tokens of a slot that is gone is answered by that.
        answered = tf.reduce_any(~prompts & ~current) | left
        rehearsed = tf.reduce_any(wishes["generation"] < 0)
        with tf.control_dependencies([committed]):
            steps = self._advance(state, asked, goal, answered, rehearsed, newest)
        with tf.control_dependencies([steps]):
            return tf.identity(whole[:, 0])

    def _take_prompts(
        self, state: State, wishes: State, token_ids: Any, prompts: Any, slot: Any, asked: Any
    ) -> tuple[State, Any, Any]:
        """Give prompts slots and run them; return the state, each wish's slot or -1, and whether some must come again.

        The longest waiting come first, as many as are worth running together.
        """
        request_id, lengths = wishes["request_id"], tf.cast(wishes["length"], tf.int32)
        known, old = self.state.find(state, request_id)
        known &= prompts
        same = prompts[:, None] & prompts & (request_id[:, None] == request_id)
        first = tf.argmax(tf.cast(same, tf.int32), axis=1, output_type=tf.int32) == tf.range(tf.size(lengths))
        wanted = prompts & first & ~known & ~self.state.is_cancelled(request_id)

        usable = self.state.usable(state) & ~(state["occupied"] & (asked | self.state.named(old, known)))
        # The lowest free slot first, since decoding costs as many rows as the highest one.
        order = tf.argsort(tf.cast(~usable, tf.int32), stable=True)
        free = tf.reduce_sum(tf.cast(usable, tf.int32))
        row = tf.argsort(tf.where(wanted, wishes["arrived"], _NEVER), stable=True)[: self.state.count]
        number = tf.range(1, tf.size(row) + 1)
        before = number[:, None] >= number
        size = tf.gather(tf.where(wanted, lengths, 0), row)
        padded = number * tf.reduce_max(tf.where(before, size, 0), axis=1)
        whole = tf.cumsum(size)
        together = (padded <= _PROMPT_TOKENS) & (padded <= 2 * whole + _PADDING) | (number == 1)
        together = tf.reduce_all(together | ~before, axis=1)
        candidate = (number <= free) & tf.gather(wanted, row)
        row, taken = (
            tf.boolean_mask(row, candidate & together),
            tf.boolean_mask(order[: tf.size(row)], candidate & together),
        )
        left = tf.reduce_any(candidate & ~together)

        values = {name: tf.gather(wishes[name], row) for name in _FOR_PROMPTS}
        values |= {"request_id": tf.gather(request_id, row), "absent": tf.zeros_like(values["seed"])}
        newest = tf.maximum(tf.reduce_max(state["generation"]), now())
        values["generation"] = newest + tf.range(1, tf.size(row, tf.int64) + 1)
        # Should running the prompts fail, the slots' last tenants must be gone before their cache is.
        gone = self.state.release(taken, tf.gather(state["generation"], taken), tf.fill(tf.shape(taken), True))
        asked_for = self.state.touch(taken, tf.fill(tf.shape(taken), True))
        state["active"] &= ~self.state.named(taken, tf.fill(tf.shape(taken), True))
        with tf.control_dependencies([gone, asked_for]):
            token = tf.cond(
                tf.size(row) > 0,
                lambda: self._run_prompts(state, taken, tf.gather(token_ids, row), values),
                lambda: tf.zeros([0], tf.int32),
            )
        some = values["budget"] > 0
        values["made"] = tf.cast(some, tf.int64)
        values["active"] = some & (token != self.geometry.eos_token_id) & (values["budget"] > 1)
        for name, value in values.items():
            state[name] = tf.tensor_scatter_nd_update(state[name], taken[:, None], value)
        places = tf.stack([taken, tf.zeros_like(taken)], axis=1)
        state["tokens"] = tf.tensor_scatter_nd_update(state["tokens"], places, tf.cast(token, tf.int64))
        slot = tf.where(known, old, slot)
        return state, tf.tensor_scatter_nd_update(slot, row[:, None], taken), left

    def _run_prompts(self, state: State, taken: Any, token_ids: Any, values: State) -> Any:
        """Run the prompts and write their keys and values into the slots `taken`; return the first tokens."""
        lengths = tf.cast(values["length"], tf.int32)
        width = tf.reduce_max(lengths)
        logits, present = self.model.prefill(token_ids[:, :width], lengths)
        longest = tf.reduce_max(tf.where(state["active"], tf.cast(state["length"], tf.int32), 0))
        self.cache.store(present, taken, width, tf.maximum(longest, width))
        return sample_token(logits, *_sampling(values), tf.zeros_like(values["seed"]))

    def _advance(self, state: State, asked: Any, goal: Any, answered: Any, rehearsed: Any, newest: Any) -> Any:
        """Decode while a slot that is `asked` for has not reached its `goal`; return how many steps, a scalar.

        After one step if something is `answered`, or a wish has `entered` the servable after the `newest` of these; one
        step is also `rehearsed`.
        """
        owned, unasked = state["owned"] > 0, now() - self.state.touched.read_value()
        fresh = asked | tf.where(owned, state["absent"] <= _STEPS_AHEAD, unasked < self.state.lease)
        lacks = asked & state["active"] & (state["made"] < goal)
        filled = state["length"] + tf.minimum(tf.constant(_STEPS, tf.int64), state["budget"] - state["made"])
        need = tf.cast(tf.reduce_max(tf.where(state["active"], filled, 0)), tf.int32)
        more = tf.reduce_any(lacks) | rehearsed
        capacity = tf.cond(more, lambda: self.cache.fit(need), lambda: 0)
        # What is answered now need not wait for more than the one step that others lack.
        answered |= tf.reduce_any(asked & ~lacks)

        def body(step: Any, more: Any) -> Any:
            state = self.state.read()
            made, ended = self._decode(state, fresh, capacity)
            lacks = asked & state["active"] & (made < goal)
            waited_for = answered | (self.state.newest.read_value()[0] > newest)
            reached = tf.reduce_any(asked & (ended | (made >= goal)))
            more = (step + 1 < _STEPS) & tf.reduce_any(lacks & ~ended) & ~waited_for & ~reached
            return step + 1, more

        steps, _ = _loop(lambda step, more: more, body, (tf.constant(0), more))
        return steps

    def _decode(self, state: State, fresh: Any, capacity: Any) -> tuple[Any, Any]:
        """One token for each active slot that is `fresh` [slots], committed; return `made` and `ended` [slots]."""
        live = state["active"] & fresh
        rows = tf.reduce_max(tf.where(live, tf.range(1, self.state.count + 1), 0))
        made = tf.cast(state["made"], tf.int32)[:rows]
        # The other rows' tokens and what they write into their part of the cache are never used.
        last = tf.gather(state["tokens"][:rows], tf.maximum(made - 1, 0), batch_dims=1)
        positions = tf.minimum(tf.cast(state["length"], tf.int32)[:rows], capacity - 1)
        logits = self.model.decode(tf.cast(last, tf.int32), positions, capacity, self.cache.read())
        token = sample_token(logits, *_sampling({name: state[name][:rows] for name in SAMPLING}), state["made"][:rows])

        numbers = tf.boolean_mask(tf.range(rows), live[:rows])
        token = tf.boolean_mask(tf.cast(token, tf.int64), live[:rows])
        places = tf.stack([numbers, tf.gather(made, numbers)], axis=1)
        tokens = tf.tensor_scatter_nd_update(state["tokens"], places, token)
        one = tf.cast(live, tf.int64)
        made, length = state["made"] + one, state["length"] + one
        end = tf.tensor_scatter_nd_update(tf.zeros_like(live), numbers[:, None], token == self.geometry.eos_token_id)
        ended = live & (end | (made >= state["budget"]))
        after = {"tokens": tokens, "made": made, "length": length, "active": state["active"] & ~ended}
        with tf.control_dependencies([self.state.commit(state | after)]):
            return tf.identity(made), tf.identity(ended)


def _after(op: Any) -> Any:
    with tf.control_dependencies([op]):
        return tf.constant(0)


def _sampling(values: State) -> tuple[Any, Any, Any, Any]:
    return values["temperature"], tf.cast(values["top_k"], tf.int32), values["top_p"], values["seed"]


def _loop(condition: Any, body: Any, variables: Any) -> Any:
    """A loop of calls of its body, which a cancelled call ends between two of them.

    One that is lowered to single ops would end with an error that the batch's other calls hear.
    """
    results = tf.while_loop(condition, body, variables)
    op = results[0].op
    while op.type not in ("While", "StatelessWhile"):
        op = op.inputs[0].op
    op._set_attr("_lower_using_switch_merge", AttrValue(b=False))
    return results
