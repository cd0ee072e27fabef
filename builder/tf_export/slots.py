"""Slots: generations that live in the servable's own variables and advance together, step by step.

prefill_slots  prompts in; each takes a slot, and its first token comes out.
decode_slots   tokens of some slots out; where one has none ready, all active slots are advanced.
release_slots  slots given back.
cancel_slots   the same by the requests' own names, also before they have a slot.

A call checks its own rows, and enters the batch queue of `slot_batching` until the committed state answers it. A row
names what it asks for: a request, or a generation and how many tokens its client has. The same row may therefore come
twice, in one call or in several, and gets the same answer. docs/slots.md is the protocol.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from builder.keras_backend import tf
from builder.tf_export.input_checks import (
    after,
    check_all,
    check_parameters,
    check_prompt,
    check_ranks,
    check_rows,
    parameter_ranks,
)
from builder.tf_export.slot_generation import continue_rows
from builder.tf_export.slot_state import SlotState, State, now
from builder.tf_export.slot_step import MOST_ROWS, SlotStep
from serving.bundle import Geometry
from serving.clients.slot_pool import AHEAD, CANCELLED, FINISHED, NO_FREE_SLOT, RUNNING, STALE

# Tokens that one call waits for at most.
_MOST = 64
# Microseconds for which a prompt waits for a slot.
_PATIENCE = 250_000


class Slots(tf.Module):  # type: ignore[misc]
    """The slots of one model, and what their signatures compute.

    Args:
        run: from (token_ids [rows, sequence], position_ids or None, kernels) to logits.
        count: slots, at least 1.
        lease: seconds after which a slot that no call has asked for stops, and may be given to another prompt.
        queue: names the batch queue of this model; equal among copies of one model, different among models.
    """

    def __init__(
        self, geometry: Geometry, run: Callable[[Any, Any, Any], Any], count: int, lease: float, queue: str
    ) -> None:
        super().__init__(name="slots")
        self.geometry, self.count = geometry, count
        self.state = SlotState(count, geometry.n_positions, lease)
        self.step = SlotStep(queue, geometry, self.state, run)

    def prefill(self, request_id: Any, token_ids: Any, lengths: Any, *parameters: Any) -> dict[str, Any]:
        """Give each prompt a slot and run it; return `slot`, `generation`, `token_ids` [batch, 1], `lengths`, `status`.

        `request_id` [batch] int64 is a prompt's name while it has its slot: a second row or call with it gets the same
        answer and runs nothing. Without a slot, `slot` is -1 and the status NO_FREE_SLOT or CANCELLED. A negative
        `request_id` is a rehearsal: its slot is free again when the call ends. The other inputs are those of
        `serving_default`.
        """
        request_id, token_ids, lengths, *given = check_ranks(
            request_id=(request_id, 1), token_ids=(token_ids, 2), lengths=(lengths, 1), **parameter_ranks(*parameters)
        )
        checks = [
            *check_prompt(self.geometry, token_ids, lengths),
            *check_parameters("token_ids", token_ids, *given),
            *check_rows("token_ids", token_ids, request_id=request_id),
            check_all(request_id != 0, "request_id must not be 0: it names the request"),
        ]
        request_id, token_ids, lengths, max_new_tokens, *values = after(checks, request_id, token_ids, lengths, *given)
        wishes, token_ids = self.step.prompts(request_id, token_ids, lengths, max_new_tokens, values, owned=False)

        patience = now() + _PATIENCE

        def unplaced(state: State) -> Any:
            found, _ = self.state.find(state, request_id)
            worth_it = tf.reduce_any(self.state.usable(state)) | (now() < patience)
            return ~found & ~self.state.is_cancelled(request_id) & worth_it

        state = self.until_answered(
            unplaced, lambda rows: self.step.for_prompts(wishes, token_ids, rows), self.step.pause_if_idle
        )
        has, slot = self.state.find(state, request_id)
        otherwise = tf.where(self.state.is_cancelled(request_id), CANCELLED, NO_FREE_SLOT)
        outputs = self._answer(state, has, slot, tf.zeros_like(slot), tf.ones_like(slot), otherwise)
        generation = tf.where(has, tf.gather(state["generation"], slot), tf.zeros_like(request_id))
        touched = self.state.touch(slot, has)
        rehearsed = self.state.release(slot, generation, has & (request_id < 0))
        with tf.control_dependencies([touched, rehearsed]):
            return outputs | {"slot": tf.where(has, slot, -1), "generation": tf.identity(generation)}

    def decode(self, slot: Any, generation: Any, received: Any, steps: Any) -> dict[str, Any]:
        """Return each row's tokens after the first `received`, at most `steps`: `token_ids`, `lengths`, `status`.

        All inputs are [batch]. If an unfinished row has no token ready, all active slots are advanced, by the
        least of such rows' `steps`, so that an unfinished row always gets one. Status STALE (`generation` is no
        longer in the slot) and AHEAD (it has not made `received` tokens) give none. A negative `generation` is a
        rehearsal: a step is run, and the status is STALE.
        """
        slot, generation, received, steps = self._checked(
            slot,
            generation,
            received=(received, lambda value: check_all(value >= 0, "received must be 0 or more")),
            steps=(steps, lambda value: check_all(value >= 1, "steps must be at least 1")),
        )
        first = self.state.read()

        def current(state: State) -> Any:
            return tf.gather(state["occupied"], slot) & (tf.gather(state["generation"], slot) == generation)

        def made(state: State) -> Any:
            return tf.cast(tf.gather(state["made"], slot), tf.int32)

        lacking = current(first) & tf.gather(first["active"], slot) & (made(first) == received)
        # However many tokens a row asks for, the others wait for no more than this.
        count = tf.reduce_min(tf.where(lacking, steps, _MOST))
        goal = received + tf.where(lacking, count, 0)

        def unanswered(state: State) -> Any:
            return current(state) & tf.gather(state["active"], slot) & (made(state) < goal) & lacking

        touched = self.state.touch(slot, current(first))
        with tf.control_dependencies([touched]):
            state = self.until_answered(
                unanswered, lambda rows: self.step.for_tokens(slot, generation, goal, rows), once=generation < 0
            )
        valid = current(state) & (received <= made(state))
        outputs = self._answer(state, valid, slot, received, steps, tf.where(current(state), AHEAD, STALE))
        with tf.control_dependencies([self.state.touch(slot, valid)]):
            return {name: tf.identity(value) for name, value in outputs.items()}

    def release(self, slot: Any, generation: Any) -> dict[str, Any]:
        """Give slots back, finished or not; return `status` [batch], FINISHED (the second time too) or STALE."""
        slot, generation = self._checked(slot, generation)
        current = (tf.gather(self.state.read()["generation"], slot) == generation) & (generation > 0)
        with tf.control_dependencies([self.state.release(slot, generation, current)]):
            return {"status": tf.where(current, FINISHED, STALE)}

    def cancel(self, request_id: Any) -> dict[str, Any]:
        """Give back whatever slots the requests [batch] have or may yet get; return `status` [batch], FINISHED."""
        (request_id,) = check_ranks(request_id=(request_id, 1))
        checks = [check_all(request_id != 0, "request_id must not be 0: it names the request")]
        (request_id,) = after(checks, request_id)
        with tf.control_dependencies([self.state.cancel(request_id)]):
            return {"status": tf.fill(tf.shape(request_id), FINISHED)}

    def generate(self, token_ids: Any, lengths: Any, max_new_tokens: Any, *sampling: Any) -> dict[str, Any]:
        """Whole answers by the slots; see `slot_generation`."""
        return continue_rows(self.step, token_ids, lengths, max_new_tokens, sampling)

    def until_answered(
        self,
        unanswered: Callable[[State], Any],
        enter: Callable[[Any], Any],
        rest: Callable[[State, State], Any] | None = None,
        once: Any = False,
    ) -> State:
        """Enter with the rows that are `unanswered` by the state, a condition [batch], until none is; return the state.

        `enter` takes the rows' numbers [some] and returns the op, `rest` the states before and after it and returns a
        tensor. Rows with `once` [batch] enter the first time.
        """

        def rows(state: State, more: Any = False) -> Any:
            return tf.where(unanswered(state) | more)[:MOST_ROWS, 0]

        def turn(rows_left: Any, before: State) -> Any:
            with tf.control_dependencies([enter(rows_left)]):
                state = self.state.read()
            with tf.control_dependencies([] if rest is None else [rest(before, state)]):
                return rows(state), state

        state = self.state.read()
        start = (rows(state, once), state)
        shapes = (tf.TensorShape([None]), {name: value.shape for name, value in state.items()})
        _, answer = tf.while_loop(lambda rows_left, _: tf.size(rows_left) > 0, turn, start, shape_invariants=shapes)
        found: State = answer
        return found

    def _answer(self, state: State, valid: Any, slot: Any, received: Any, steps: Any, otherwise: Any) -> State:
        """Tokens of each valid row from `received` on, at most `steps`; the status `otherwise` for the other rows."""
        made = tf.cast(tf.gather(state["made"], slot), tf.int32)
        received = tf.where(valid, received, 0)
        lengths = tf.where(valid, tf.minimum(made - received, steps), 0)
        # The largest of no rows is the least integer.
        columns = tf.range(tf.maximum(tf.reduce_max(lengths), 0))
        index = tf.minimum(received[:, None] + columns, self.geometry.n_positions - 1)
        tokens = tf.cast(tf.gather(tf.gather(state["tokens"], slot), index, batch_dims=1), tf.int32)
        finished = ~tf.gather(state["active"], slot) & (received + lengths == made)
        return {
            "token_ids": tf.where(columns < lengths[:, None], tokens, self.geometry.eos_token_id),
            "lengths": lengths,
            "status": tf.where(valid, tf.where(finished, FINISHED, RUNNING), otherwise),
        }

    def _checked(self, slot: Any, generation: Any, **others: tuple[Any, Callable[[Any], Any]]) -> list[Any]:
        """All inputs of a call that names slots, checked; `others` are more of them with checks of their own."""
        ranks = {"slot": (slot, 1), "generation": (generation, 1)}
        ranks |= {name: (value, 1) for name, (value, _) in others.items()}
        slot, generation, *values = check_ranks(**ranks)
        named = dict(zip(others, values, strict=True))
        checks = [
            *check_rows("slot", slot, generation=generation, **named),
            check_all((slot >= 0) & (slot < self.count), f"slot must be from 0 to {self.count - 1}"),
            *[check(value) for (_, check), value in zip(others.values(), values, strict=True)],
        ]
        return after(checks, slot, generation, *values)
