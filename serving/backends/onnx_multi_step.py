"""Multi-step decode: several steps for one call of the host, with sampling inside the graph.

A block is a number of steps that are launched without waiting; then their tokens are fetched together. CUDA can capture
a step as a CUDA graph, which needs the same addresses and shapes each time: the buffers of an `Arena`. The same code
runs on a CPU, without capturing.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from serving.backends.base import FloatArray, IntArray, SamplingRequest, check_capacity, pad_right
from serving.backends.devices import batch_bucket, capacity_bucket
from serving.sampling import SamplingParams, SamplingRows

_NEVER_CAPTURED = "-1"


@dataclass
class Arena:
    """Buffers of a batch bucket and a capacity, on the device, the binding of a step to them, and its options.

    `waits` makes the host wait for the step, `goes_on` does not. `padding` is the position of the idle rows, which run
    along.
    """

    rows: int
    capacity: int
    buffers: dict[str, Any]
    binding: Any
    waits: Any
    goes_on: Any
    padding: int = 0


@dataclass
class MultiStepState:
    """A running batch in an arena: its prompts until their prefill, then the positions filled so far, [rows]."""

    arena: Arena
    rows: int
    prompts: tuple[IntArray, IntArray] | None
    lengths: IntArray
    prompt_logits: bool = False


class MultiStepDecoder:
    """A variant's graph `greedy` or `sample` in a session of its own.

    Args:
        session: the session of the graph.
        device: kind and number, as `parse_device` gives them.
        steps: maximum steps of a block, the width of its token buffer.
        captured: whether the session was opened with CUDA graphs.
    """

    def __init__(self, session: Any, device: tuple[str, int], n_positions: int, steps: int, captured: bool) -> None:
        self.steps = steps
        self._session, self._device, self._n_positions, self._captured = session, device, n_positions, captured
        self._inputs = {value.name: value for value in session.get_inputs()}
        self._past = [name for name in self._inputs if name.startswith("past_key_values.")]
        past = self._inputs[self._past[0]]
        self._cache_dtype: Any = np.float16 if past.type == "tensor(float16)" else np.float32
        self._cache_shape = (past.shape[1], past.shape[3])
        self._vocab_size = next(value.shape[2] for value in session.get_outputs() if value.name == "logits")
        self._idle: dict[tuple[int, int], list[Arena]] = {}
        self._arenas = 0

    def open(self, prompts: Sequence[Sequence[int]], capacity: int) -> MultiStepState:
        """Open a batch, whose prefill is part of the first block. Deleting the state frees its arena."""
        check_capacity(prompts, capacity, self._n_positions)
        key = batch_bucket(len(prompts)), capacity_bucket(capacity, self._n_positions)
        idle = self._idle.setdefault(key, [])
        arena = idle.pop() if idle else self._arena(*key)
        token_ids, lengths = pad_right(prompts)
        state = MultiStepState(arena, len(prompts), (token_ids, lengths), np.zeros_like(lengths))
        weakref.finalize(state, idle.append, arena)
        return state

    def run(
        self, state: MultiStepState, count: int, request: SamplingRequest | None, draws: FloatArray | None
    ) -> IntArray:
        """Run `count` steps and return their tokens, [rows, count]; an uncertain token is returned as -1 - token.

        A sampling graph takes its random numbers from `draws`, [rows, count], and its parameters from `request`. The
        greedy graph uses neither.
        """
        arena, rows = state.arena, state.rows
        last = state.lengths if state.prompts is None else state.prompts[1] - 1
        # The prefill runs without idle rows, which then start at 0, one step later.
        padding = arena.padding if state.prompts is None else -1
        start = np.concatenate([last, np.full(arena.rows - rows, padding)])
        self._put(arena, "start", start[:, None])
        if "draws" in self._inputs:
            assert request is not None and draws is not None, "a sampling graph needs parameters and random numbers"
            for name, value in request.sampling.arrays().items():
                self._put(arena, name, value)
            self._put(arena, "draws", np.pad(draws, ((0, 0), (0, self.steps - count))))
        remaining = count
        if state.prompts is not None:
            self._run_prompts(state, *state.prompts, wait=count == 1)
            remaining -= 1
        state.prompt_logits = state.prompts is not None and count == 1
        state.prompts = None
        for index in range(remaining):
            options = arena.waits if index == remaining - 1 else arena.goes_on
            self._session.run_with_iobinding(arena.binding, options)
        arena.padding += remaining
        state.lengths = last + count
        tokens: IntArray = arena.buffers["tokens"].numpy()[:rows, :count].copy()
        return tokens

    def seek(self, state: MultiStepState, lengths: IntArray, tokens: IntArray) -> None:
        """Continue as if `lengths` positions, [rows], were filled and `tokens`, [rows], came next.

        Rewinding works because attention never reads the KV cache beyond a row's length.
        """
        state.lengths = lengths.copy()
        self._place(state.arena, lengths, tokens)

    def logits(self, state: MultiStepState) -> FloatArray:
        """The last step's logits, [rows, vocab_size]."""
        name = "prompt_logits" if state.prompt_logits else "logits"
        logits: FloatArray = state.arena.buffers[name].numpy()
        return logits[: state.rows, 0]

    def prompt_logits(self, state: MultiStepState) -> FloatArray:
        """The logits after the prompts, [rows, vocab_size], valid until the arena opens another batch."""
        logits: FloatArray = state.arena.buffers["prompt_logits"].numpy()
        return logits[: state.rows, 0]

    def _run_prompts(self, state: MultiStepState, token_ids: IntArray, lengths: IntArray, wait: bool) -> None:
        """The prefill, of the real rows only, in the first rows of the buffers."""
        arena, rows, width = state.arena, state.rows, token_ids.shape[1]
        self._place(arena, lengths, np.zeros(rows, np.int64))
        binding = self._session.io_binding()
        columns = np.arange(width)
        binding.bind_cpu_input("input_ids", token_ids)
        binding.bind_cpu_input("attention_mask", (columns < lengths[:, None]).astype(np.int64))
        # No position exceeds a row's last one, from which sampling counts its steps.
        binding.bind_cpu_input("position_ids", np.minimum(columns, lengths[:, None] - 1))
        binding.bind_cpu_input("newest", lengths[:, None] - 1)
        binding.bind_cpu_input("columns", columns)
        for name in self._inputs:
            if name not in ("input_ids", "attention_mask", "position_ids", "newest", "columns"):
                self._bind_rows(binding.bind_input, name, arena.buffers[name], rows)
        for name in self._past:
            self._bind_rows(binding.bind_output, _present(name), arena.buffers[name], rows)
        self._bind_rows(binding.bind_output, "logits", arena.buffers["prompt_logits"], rows)
        self._bind_rows(binding.bind_output, "next_tokens", arena.buffers["tokens"], rows)
        self._bind_rows(binding.bind_output, "next_input_ids", arena.buffers["input_ids"], rows)
        for name in ("next_position_ids", "next_attention_mask"):
            binding.bind_output(name, self._device[0], self._device[1])
        self._session.run_with_iobinding(binding, _run_options(_NEVER_CAPTURED if self._captured else None, wait))

    def _arena(self, rows: int, capacity: int) -> Arena:
        """New buffers. With CUDA graphs, capture a step on them, which runs it several times on dummy data."""
        heads, head_dim = self._cache_shape
        logits = np.zeros((rows, 1, self._vocab_size), np.float32)
        values: dict[str, Any] = {
            "input_ids": np.zeros((rows, 1), np.int64),
            "attention_mask": np.zeros((rows, capacity), np.int64),
            "position_ids": np.zeros((rows, 1), np.int64),
            "newest": np.zeros((rows, 1), np.int64),
            "start": np.zeros((rows, 1), np.int64),
            "columns": np.arange(capacity),
            "slots": np.arange(self.steps),
            "tokens": np.zeros((rows, self.steps), np.int64),
            "draws": np.zeros((rows, self.steps), np.float32),
            **SamplingRows.of([SamplingParams(temperature=1.0)] * rows).arrays(),
        }
        values = {name: value for name, value in values.items() if name in self._inputs}
        values |= {"logits": logits, "prompt_logits": logits}
        buffers = {name: self._to_device(value) for name, value in values.items()}
        empty = np.zeros((rows, heads, capacity, head_dim), self._cache_dtype)
        buffers |= {name: self._to_device(empty) for name in self._past}
        binding = self._session.io_binding()
        for name in self._inputs:
            binding.bind_ortvalue_input(name, buffers[name])
        for name in self._past:
            binding.bind_ortvalue_output(_present(name), buffers[name])
        binding.bind_ortvalue_output("logits", buffers["logits"])
        for name in ("input_ids", "position_ids", "attention_mask", "tokens"):
            binding.bind_ortvalue_output(f"next_{name}", buffers[name])
        self._arenas += 1
        # 0 is ONNX Runtime's own.
        graph = str(self._arenas) if self._captured else None
        arena = Arena(rows, capacity, buffers, binding, _run_options(graph, True), _run_options(graph, False))
        if self._captured:
            self._place(arena, np.zeros(rows, np.int64), np.zeros(rows, np.int64))
            self._session.run_with_iobinding(binding, arena.waits)
        return arena

    def _place(self, arena: Arena, lengths: IntArray, tokens: IntArray) -> None:
        """Set the input of the next step; idle rows start at 0."""
        self._put(arena, "position_ids", lengths[:, None])
        self._put(arena, "input_ids", tokens[:, None])
        arena.padding = 0
        padded = np.pad(lengths, (0, arena.rows - len(lengths)))
        self._put(arena, "attention_mask", (np.arange(arena.capacity) <= padded[:, None]).astype(np.int64))

    def _put(self, arena: Arena, name: str, value: Any) -> None:
        """Write `value` into the first rows of a buffer, zeros into the others."""
        padding = [(0, arena.rows - len(value)), *[(0, 0)] * (value.ndim - 1)]
        dtype = np.float32 if value.dtype.kind == "f" else np.int64
        arena.buffers[name].update_inplace(np.ascontiguousarray(np.pad(value, padding), dtype))

    def _bind_rows(self, bind: Any, name: str, buffer: Any, rows: int) -> None:
        """Bind the first `rows` of a buffer, or all of it if it has no rows."""
        shape = buffer.shape() if name == "slots" else [rows, *buffer.shape()[1:]]
        bind(name, self._device[0], self._device[1], _DTYPES[buffer.data_type()], shape, buffer.data_ptr())

    def _to_device(self, value: Any) -> Any:
        # A copy: on a CPU the value would share the memory of the array.
        return ort.OrtValue.ortvalue_from_numpy(value.copy(), *self._device)


_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


def _present(name: str) -> str:
    return name.replace("past_key_values", "present")


def _run_options(graph: str | None, wait: bool) -> Any:
    options = ort.RunOptions()
    if graph is not None:
        options.add_run_config_entry("gpu_graph_id", graph)
    options.add_run_config_entry("disable_synchronize_execution_providers", "0" if wait else "1")
    return options
