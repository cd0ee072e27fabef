"""Slots: generations that live in the servable's own variables and advance together, call by call.

prefill_slots  prompts in; each takes a slot, and its first token comes out.
decode_slots   tokens of some slots out; where one has none ready, every active slot is advanced.
release_slots  slots given back.

A call holds a lock from its first read of the state to its last write, so calls may come at once, and in any order.
What a row asks for is named by itself (a request, or a generation and how many tokens its client has), so a row may
come twice, in one call or in several, and is answered alike. docs/slots.md is the protocol.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from builder.keras_backend import tf
from builder.tf_export.input_checks import after, check_all, check_parameters, check_prompt, check_rows
from builder.tf_export.kernels import PromptKernels, SlotKernels
from builder.tf_export.sampling import choose
from builder.tf_export.slot_cache import SlotCache
from serving.bundle import Geometry
from serving.clients.slot_pool import AHEAD, FINISHED, NO_FREE_SLOT, RUNNING, STALE

_STATE = {
    "occupied": "bool",
    "active": "bool",
    "request_id": "int64",
    "generation": "int64",
    "touched": "float64",
    "length": "int32",
    "made": "int32",
    "budget": "int32",
    "temperature": "float32",
    "top_k": "int32",
    "top_p": "float32",
    "seed": "int64",
}
_SAMPLING = ("temperature", "top_k", "top_p", "seed")
# Tokens that one call makes for a slot at most.
_MOST = 64

State = dict[str, Any]


class Slots(tf.Module):  # type: ignore[misc]
    """The slots of one model, and what their three signatures compute.

    Args:
        run: from (token_ids [rows, sequence], position_ids or None, kernels) to logits.
        count: slots, at least 1.
        lease: seconds after which a slot that no call has asked for stops, and may be given to another prompt.
    """

    def __init__(self, geometry: Geometry, run: Callable[[Any, Any, Any], Any], count: int, lease: float) -> None:
        super().__init__(name="slots")
        self.geometry, self.run, self.count, self.lease = geometry, run, count, lease
        self.state = {name: tf.Variable(tf.zeros([count], dtype), trainable=False) for name, dtype in _STATE.items()}
        self.state["tokens"] = tf.Variable(tf.zeros([count, geometry.n_positions], tf.int32), trainable=False)
        self.cache = SlotCache(geometry, count)

    def prefill(
        self,
        request_id: Any,
        token_ids: Any,
        lengths: Any,
        max_new_tokens: Any,
        temperature: Any,
        top_k: Any,
        top_p: Any,
        seed: Any,
    ) -> dict[str, Any]:
        """Give each prompt a slot and run it; return `slot`, `generation`, `token_ids` [batch, 1], `lengths`, `status`.

        `request_id` [batch] int64 is a prompt's name while it has its slot: a second row or call with it gets the same
        answer and runs nothing. Without a free slot, `slot` is -1 and the status NO_FREE_SLOT. The other inputs are
        those of `serving_default`.
        """
        checks = [
            *check_prompt(self.geometry, token_ids, lengths),
            *check_parameters(token_ids, max_new_tokens, temperature, top_k, top_p, seed),
            *check_rows("token_ids", token_ids, request_id=request_id),
            check_all(request_id != 0, "request_id must not be 0: it names the request"),
        ]
        request_id, token_ids, lengths, max_new_tokens, temperature, top_k, top_p, seed = after(
            checks, request_id, token_ids, lengths, max_new_tokens, temperature, top_k, top_p, seed
        )
        sampling = dict(zip(_SAMPLING, (temperature, top_k, top_p, seed), strict=True))

        def work() -> dict[str, Any]:
            now = tf.timestamp()
            state = self._read()
            slot, rows, rank = self._admit(state, request_id, now)
            taken = tf.gather(slot, rows)
            newest = tf.maximum(tf.reduce_max(state["generation"]), tf.cast(now * 1e6, tf.int64))
            values = {name: tf.gather(value, rows) for name, value in sampling.items()} | {
                "occupied": tf.fill(tf.shape(rows), True),
                "request_id": tf.gather(request_id, rows),
                "generation": newest + 1 + tf.cast(tf.gather(rank, rows), tf.int64),
                "length": tf.gather(lengths, rows),
                "budget": tf.gather(tf.minimum(max_new_tokens, self.geometry.n_positions - lengths), rows),
            }
            for name in ("occupied", "active"):
                state[name] = _put(state[name], taken, tf.fill(tf.shape(rows), False))
            # Should running the prompts fail, the slots' last tenants must be gone before their cache is.
            with tf.control_dependencies([self.state[name].assign(state[name]) for name in ("occupied", "active")]):
                token = tf.cond(
                    tf.size(rows) > 0,
                    lambda: self._run_prompts(state, taken, tf.gather(token_ids, rows), values),
                    lambda: tf.zeros([0], tf.int32),
                )
            some = values["budget"] > 0
            values["made"] = tf.cast(some, tf.int32)
            values["active"] = some & (token != self.geometry.eos_token_id) & (values["budget"] > 1)
            for name, value in values.items():
                state[name] = _put(state[name], taken, value)
            places = tf.stack([taken, tf.zeros_like(taken)], axis=1)
            state["tokens"] = tf.tensor_scatter_nd_update(state["tokens"], places, token)

            has, here = slot >= 0, tf.maximum(slot, 0)
            outputs = self._answer(state, has, here, tf.zeros_like(here), tf.ones_like(here), NO_FREE_SLOT)
            self._write(self._touch(state, has, here, now))
            generation = tf.where(has, tf.gather(state["generation"], here), tf.zeros_like(request_id))
            return outputs | {"slot": slot, "generation": generation}

        return self._locked(work, request_id, token_ids, lengths, max_new_tokens, *sampling.values())

    def decode(self, slot: Any, generation: Any, received: Any, steps: Any) -> dict[str, Any]:
        """Return each row's tokens behind the first `received`, at most `steps`: `token_ids`, `lengths`, `status`.

        All inputs are [batch]. If an unfinished row has no token ready, all active slots are advanced, by the
        least of such rows' `steps`, so that an unfinished row always gets one. Status STALE (`generation` is no
        longer in the slot) and AHEAD (it has not made `received` tokens) give none.
        """
        checks = [
            *self._check_slots(slot, generation=generation, received=received, steps=steps),
            tf.debugging.assert_non_negative(received, "received must be 0 or more"),
            tf.debugging.assert_greater_equal(steps, 1, "steps must be at least 1"),
        ]
        slot, generation, received, steps = after(checks, slot, generation, received, steps)

        def work() -> dict[str, Any]:
            now = tf.timestamp()
            state = self._read()
            current = tf.gather(state["occupied"], slot) & (tf.gather(state["generation"], slot) == generation)
            lacking = current & tf.gather(state["active"], slot) & (tf.gather(state["made"], slot) == received)
            asked = self._named(lacking, slot)
            live = state["active"] & (asked | (now - state["touched"] < self.lease))
            # However many a row asks for, the others wait for no more than this.
            count = tf.reduce_min(tf.where(lacking, steps, _MOST))
            state |= tf.cond(
                tf.reduce_any(lacking),
                lambda: self._advance(state, live, asked, count),
                lambda: {name: state[name] for name in ("active", "length", "made", "tokens")},
            )
            valid = current & (received <= tf.gather(state["made"], slot))
            outputs = self._answer(state, valid, slot, received, steps, tf.where(current, AHEAD, STALE))
            self._write(self._touch(state, valid, slot, now))
            return outputs

        return self._locked(work, slot, generation, received, steps)

    def release(self, slot: Any, generation: Any) -> dict[str, Any]:
        """Give slots back, finished or not; return `status` [batch], FINISHED (the second time too) or STALE."""
        slot, generation = after(self._check_slots(slot, generation=generation), slot, generation)

        def work() -> dict[str, Any]:
            state = self._read()
            current = (tf.gather(state["generation"], slot) == generation) & (generation > 0)
            kept = ~self._named(current, slot)
            self._write(state | {name: state[name] & kept for name in ("occupied", "active")})
            return {"status": tf.where(current, FINISHED, STALE)}

        return self._locked(work, slot, generation)

    def _admit(self, state: State, request_id: Any, now: Any) -> tuple[Any, Any, Any]:
        """Choose slots: `slot` [batch] (-1 for none), the rows that are new to theirs, and each such row's rank."""
        same = state["occupied"] & (request_id[:, None] == state["request_id"])
        known = tf.reduce_any(same, axis=1)
        first = tf.argmax(tf.cast(request_id[:, None] == request_id, tf.int32), axis=1, output_type=tf.int32)
        wanted = ~known & (first == tf.range(tf.shape(request_id)[0]))
        idle = (now - state["touched"] >= self.lease) & ~tf.reduce_any(same, axis=0)
        usable = ~state["occupied"] | idle
        # The lowest free slot first, since decoding costs as many rows as the highest one; then the longest unused.
        numbers = tf.cast(tf.range(self.count), tf.float64)
        key = tf.where(state["occupied"], state["touched"], numbers)
        order = tf.argsort(tf.where(usable, key, tf.constant(float("inf"), tf.float64)))
        rank = tf.cumsum(tf.cast(wanted, tf.int32)) - 1
        admitted = wanted & (rank < tf.reduce_sum(tf.cast(usable, tf.int32)))
        new = tf.gather(order, tf.clip_by_value(rank, 0, self.count - 1))
        old = tf.argmax(tf.cast(same, tf.int32), axis=1, output_type=tf.int32)
        slot = tf.where(known, old, tf.where(admitted, new, -1))
        return tf.gather(slot, first), tf.where(admitted)[:, 0], rank

    def _run_prompts(self, state: State, taken: Any, token_ids: Any, values: State) -> Any:
        """Run the prompts and write their keys and values into the slots `taken`; return the first tokens."""
        width = tf.reduce_max(values["length"])
        kernels = PromptKernels(self.geometry, values["length"], last=True)
        logits = self.run(token_ids[:, :width], None, kernels)
        longest = tf.reduce_max(tf.where(state["active"], state["length"], 0))
        self.cache.store(kernels.present, taken, width, tf.maximum(longest, width))
        temperature, top_k, top_p, seed = (values[name] for name in _SAMPLING)
        return choose(logits, temperature, top_k, top_p, seed, tf.zeros_like(seed))

    def _advance(self, state: State, live: Any, asked: Any, count: Any) -> State:
        """Decode up to `count` tokens of every `live` slot, while one that was `asked` for goes on."""
        end = self.geometry.eos_token_id
        filled = state["length"] + tf.minimum(count, state["budget"] - state["made"])
        cache, capacity = self.cache.fit(tf.reduce_max(tf.where(state["active"], filled, 0)))
        rows = tf.reduce_max(tf.where(live, tf.range(1, self.count + 1), 0))
        temperature, top_k, top_p, seed = (state[name][:rows] for name in _SAMPLING)
        live, asked, budget = live[:rows], asked[:rows], state["budget"][:rows]
        numbers = tf.range(rows)

        def unfinished(step: Any, live: Any, *rest: Any) -> Any:
            return (step < count) & tf.reduce_any(live & asked)

        def body(step: Any, live: Any, length: Any, made: Any, tokens: Any, cache: Any) -> Any:
            # The other rows' tokens and what they write into their part of the cache are never used.
            last = tf.gather(tokens[:rows], tf.maximum(made - 1, 0), batch_dims=1)
            positions = tf.minimum(length, capacity - 1)
            kernels = SlotKernels(self.geometry, positions, cache, capacity)
            logits = self.run(last[:, None], positions[:, None], kernels)
            token = choose(logits, temperature, top_k, top_p, seed, tf.cast(made, tf.int64))
            places = tf.boolean_mask(tf.stack([numbers, made], axis=1), live)
            tokens = tf.tensor_scatter_nd_update(tokens, places, tf.boolean_mask(token, live))
            made, length = made + tf.cast(live, tf.int32), length + tf.cast(live, tf.int32)
            return step + 1, live & (token != end) & (made < budget), length, made, tokens, kernels.present

        start = (tf.constant(0), live, state["length"][:rows], state["made"][:rows], state["tokens"], cache)
        _, going, length, made, tokens, _ = tf.while_loop(unfinished, body, start)
        ended = live & ~going
        active = tf.concat([state["active"][:rows] & ~ended, state["active"][rows:]], 0)
        rest = {"length": length, "made": made}
        return {name: tf.concat([value, state[name][rows:]], 0) for name, value in rest.items()} | {
            "active": active,
            "tokens": tokens,
        }

    def _answer(self, state: State, valid: Any, slot: Any, received: Any, steps: Any, otherwise: Any) -> State:
        """Tokens of each valid row from `received` on, at most `steps`; the status `otherwise` for the other rows."""
        made = tf.gather(state["made"], slot)
        received = tf.where(valid, received, 0)
        lengths = tf.where(valid, tf.minimum(made - received, steps), 0)
        columns = tf.range(tf.reduce_max(lengths))
        index = tf.minimum(received[:, None] + columns, self.geometry.n_positions - 1)
        tokens = tf.gather(tf.gather(state["tokens"], slot), index, batch_dims=1)
        finished = ~tf.gather(state["active"], slot) & (received + lengths == made)
        return {
            "token_ids": tf.where(columns < lengths[:, None], tokens, self.geometry.eos_token_id),
            "lengths": lengths,
            "status": tf.where(valid, tf.where(finished, FINISHED, RUNNING), otherwise),
        }

    def _touch(self, state: State, valid: Any, slot: Any, now: Any) -> State:
        return state | {"touched": tf.where(self._named(valid, slot), now, state["touched"])}

    def _named(self, condition: Any, slot: Any) -> Any:
        """Which slots [slots] some row with `condition` [batch] names."""
        return tf.reduce_any(condition[:, None] & (slot[:, None] == tf.range(self.count)), axis=0)

    def _check_slots(self, slot: Any, **others: Any) -> list[Any]:
        message = f"slot must be from 0 to {self.count - 1}"
        return [
            *check_rows("slot", slot, **others),
            tf.debugging.assert_non_negative(slot, message),
            tf.debugging.assert_less(slot, self.count, message),
        ]

    def _read(self) -> State:
        return {name: variable.read_value() for name, variable in self.state.items()}

    def _write(self, state: State) -> None:
        for name, variable in self.state.items():
            variable.assign(state[name])

    def _locked(self, work: Callable[[], State], *inputs: Any) -> State:
        """Run `work` on checked inputs while no other call is inside; one that fails within lets go of the lock."""
        with tf.control_dependencies(inputs):
            lock = tf.raw_ops.MutexLock(mutex=tf.raw_ops.MutexV2(shared_name="slots"))
        with tf.control_dependencies([lock]):
            # A function ends when all that it assigns is assigned, not when its outputs are there.
            outputs = tf.function(work, autograph=False)()
        with tf.control_dependencies(list(outputs.values())):
            released = tf.raw_ops.ConsumeMutexLock(mutex_lock=lock)
        with tf.control_dependencies([released]):
            return {name: tf.identity(value) for name, value in outputs.items()}


def _put(state: Any, slots: Any, values: Any) -> Any:
    return tf.tensor_scatter_nd_update(state, slots[:, None], values)
