"""A bundle's ONNX graphs in ONNX Runtime: the optimised one on a shared cache buffer, the portable by concatenation.

Tensors stay bound between steps: a shared buffer is at once past and present, so no step copies a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from serving.backends.base import FloatArray, IntArray, check_capacity, check_room, pad_right
from serving.bundle import Bundle
from serving.errors import BundleError

DEFAULT_GRAPH = "ort/fp32"


@dataclass
class State:
    """A batch of rows being decoded: their lengths so far, [rows], and the binding that holds their cache."""

    lengths: IntArray
    capacity: int
    mask: IntArray
    binding: Any
    cache: list[Any]
    logits: FloatArray | None = None


class OnnxBackend:
    """One ONNX graph of a bundle, on the CPU.

    Args:
        bundle: an opened bundle.
        graph_name: the graph's name in the manifest, such as "ort/fp32" or "onnx/portable".
        threads: intra-operator threads; None leaves the choice to ONNX Runtime (one a physical core).
    """

    def __init__(self, bundle: Bundle, graph_name: str = DEFAULT_GRAPH, threads: int | None = None) -> None:
        geometry = bundle.manifest.model
        graph = bundle.graph(graph_name)
        self.name = graph_name
        self.vocab_size, self.n_positions = geometry.vocab_size, geometry.n_positions
        self._cache_shape = (geometry.n_head, geometry.head_dim)
        self._shared = graph.cache == "shared-buffer"
        self._past = [name for name in graph.inputs if name.startswith("past_key_values.")]
        self._cache_dtype = np.dtype(graph.inputs[self._past[0]].dtype)
        self._present = [name.replace("past_key_values", "present") for name in self._past]
        options = ort.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = ort.InferenceSession(
                str(bundle.path(graph.path)), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's errors share no narrower base.
            reason = " ".join(str(error).split())
            raise BundleError(f"{bundle.folder}: ONNX Runtime cannot load {graph.path}: {reason}") from None

    def prefill(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[State, FloatArray]:
        """See `Backend.prefill`."""
        check_capacity(prompts, capacity, self.n_positions)
        token_ids, lengths = pad_right(prompts)
        rows, width = token_ids.shape
        mask = np.zeros((rows, capacity), np.int64)
        mask[:, :width] = np.arange(width) < lengths[:, None]
        state = State(lengths, capacity, mask, self._session.io_binding(), [])
        heads, head_dim = self._cache_shape
        length = capacity if self._shared else 0
        for name in self._past:
            state.cache.append(_zeros((rows, heads, length, head_dim), self._cache_dtype))
            state.binding.bind_ortvalue_input(name, state.cache[-1])
        positions = np.broadcast_to(np.arange(width), token_ids.shape)
        logits = self._run(state, token_ids, positions, width)
        if logits.shape[1] == 1:
            return state, logits[:, 0]
        return state, np.take_along_axis(logits, (lengths - 1)[:, None, None], axis=1)[:, 0]

    def decode(self, state: State, tokens: IntArray) -> FloatArray:
        """See `Backend.decode`."""
        check_room(state.lengths, state.capacity)
        if self._shared:
            # Row by row the new token lands behind the row's own last one.
            state.mask[np.arange(len(tokens)), state.lengths] = 1
            total = int(state.lengths.max()) + 1
        else:
            # Concatenation puts every row's new token in the same column, behind the widest row's padding.
            total = state.cache[0].shape()[2] + 1
            if total > state.mask.shape[1]:
                state.mask = np.pad(state.mask, ((0, 0), (0, state.capacity)))
            state.mask[:, total - 1] = 1
        logits = self._run(state, tokens[:, None], state.lengths[:, None], total)
        state.lengths += 1
        return logits[:, 0]

    def _run(self, state: State, token_ids: IntArray, positions: IntArray, total: int) -> FloatArray:
        binding = state.binding
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(token_ids, np.int64))
        binding.bind_cpu_input("attention_mask", np.ascontiguousarray(state.mask[:, :total]))
        binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions, np.int64))
        if not self._shared:
            return self._run_concatenated(state)
        if state.logits is None:
            state.logits = np.empty((len(token_ids), 1, self.vocab_size), np.float32)
            binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(state.logits))
            for name, value in zip(self._present, state.cache, strict=True):
                binding.bind_ortvalue_output(name, value)
        self._session.run_with_iobinding(binding)
        return state.logits

    def _run_concatenated(self, state: State) -> FloatArray:
        for name in ("logits", *self._present):
            state.binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(state.binding)
        logits, *state.cache = state.binding.get_outputs()
        for name, value in zip(self._past, state.cache, strict=True):
            state.binding.bind_ortvalue_input(name, value)
        result: FloatArray = logits.numpy()
        return result


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """Zeros, so that no slot that was never written can hold not-a-number."""
    return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))
