"""Slots over an optimised ONNX graph: one buffer a block for all slots, which no call copies.

GroupQueryAttention takes more than one new token on top of a past at batch 1 only. So a piece of a prompt is bound at
the offset of its own slot, a batch of one; rows that decode are bound as the leading part of the same buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from serving.backends.base import FloatArray, IntArray, SampledTokens, SamplingRequest
from serving.backends.devices import parse_device
from serving.backends.onnx import DEFAULT_GRAPH
from serving.backends.onnx_logits import OFFSETS, with_offsets
from serving.backends.onnx_session import SAMPLING_GRAPH, bind_sampling_request, device_zeros, open_graph
from serving.backends.onnx_verify import open_verify_session
from serving.backends.prefill_graph import check_cache_layouts
from serving.backends.verify_steps import CHAIN, CHAIN_STEP, FP32_STEP, is_small, wants_verify_session
from serving.bundle import Bundle
from serving.engine.slot_backend import cache_bytes, scored_tokens
from serving.errors import InputError

_LAST = np.zeros(1, np.int64)


class OnnxSlotBackend:
    """A `SlotBackend` over a graph whose cache is a "shared-buffer".

    Args:
        bundle: an opened bundle.
        graph_name: the graph's name in the manifest, such as "ort/int8".
        slots, max_length: sizes of the cache; memory is taken as positions are first written, on the processor.
        threads: intra-operator threads; None leaves the choice to ONNX Runtime.
        device: "cpu", "cuda" or "cuda:N"; only the first can copy positions from slot to slot.
        supports_device_sampling: whether to sample on the device, by the bundle's sampling graph; None means on CUDA
            only, if the bundle has that graph.
        speculation: whether to have `verify` where its tokens are those of `decode`.
        prefill_graph: another graph, with the same kind of KV cache, that runs the prompts, on a CPU; None means none.

    Raises InputError for a graph of another kind, RuntimeMissingError for a device that is not there.
    """

    def __init__(
        self,
        bundle: Bundle,
        graph_name: str = DEFAULT_GRAPH,
        *,
        slots: int,
        max_length: int,
        threads: int | None = None,
        device: str = "cpu",
        supports_device_sampling: bool | None = None,
        speculation: bool = False,
        prefill_graph: str | None = None,
    ) -> None:
        geometry, graph = bundle.manifest.model, bundle.graph(graph_name)
        if graph.runtime != "onnx" or graph.cache != "shared-buffer":
            raise InputError(
                f"{bundle.folder}: the graph {graph_name!r} has no shared cache buffer, which serving many at once "
                "needs; ask for 'ort/fp32' or another 'ort/' graph"
            )
        if prefill_graph is not None:
            check_cache_layouts(bundle, graph_name, prefill_graph)
            if device != "cpu":
                raise InputError(f"a prefill graph runs on the processor only, not on {device}")
        self.name, self.copies = graph_name, device == "cpu"
        self._place = parse_device(device)
        self.vocab_size, self.n_positions = geometry.vocab_size, geometry.n_positions
        self.slots, self.max_length = slots, max_length
        self._past = [name for name in graph.inputs if name.startswith("past_key_values.")]
        dtype = graph.inputs[self._past[0]].dtype
        # A chain also writes the positions of its padding.
        self._spare = CHAIN if speculation and device == "cpu" and wants_verify_session(bundle, graph_name) else 0
        self._row = (geometry.n_head, max_length + self._spare, graph.cache_head_dim(geometry))
        self.cache_bytes = cache_bytes(geometry, slots, self._row[1], dtype)
        # Threads of sessions that take turns would otherwise wait on each other's cores.
        spin = (not self._spare or is_small(bundle, graph_name)) and prefill_graph is None

        def open_session(name: str) -> Any:
            return open_graph(
                bundle, name, device, threads, edit=lambda data: with_offsets(data, geometry.n_embd), spin=spin
            )

        self._session: Any = open_session(graph_name)
        self._prefill_session: Any = self._session if prefill_graph is None else open_session(prefill_graph)
        self._offsets = _takes_offsets(self._prefill_session)
        self.scored_tokens = scored_tokens(self.vocab_size, max_length) if self._offsets else 0
        self._verifier = open_verify_session(bundle, graph_name, threads, self._session) if self._spare else None
        self._verifying: dict[int, Any] = {}
        in_chunks = speculation and device == "cpu" and graph.precision == "fp32" and self._offsets
        in_chunks = in_chunks and prefill_graph is None
        self.verify_step = FP32_STEP if in_chunks else CHAIN_STEP if self._verifier is not None else None
        self._scored_logits = np.empty((0, 1, self.vocab_size), np.float32)
        self._verify_logits = np.empty((FP32_STEP.tokens if in_chunks else 0, 1, self.vocab_size), np.float32)
        self._chunks: dict[tuple[int, int], Any] = {}
        """Bindings of verify steps in chunks, by slot and number of tokens."""
        # Zeros, so that no position can hold not-a-number. numpy's are pages that the system gives out when written.
        self._buffers = [_Buffer((slots, *self._row), np.dtype(dtype), device) for _ in self._past]
        has_choice = SAMPLING_GRAPH in bundle.manifest.graphs
        self.supports_device_sampling = has_choice and (
            device != "cpu" if supports_device_sampling is None else supports_device_sampling
        )
        self._logits = np.empty((slots, 1, self.vocab_size), np.float32)
        self._prompt_logits = np.empty((1, 1, self.vocab_size), np.float32)
        self._leading: dict[int, Any] = {}
        self._alone: dict[int, Any] = {}
        self._scoring: dict[int, Any] = {}
        if self.supports_device_sampling:
            self._kept_logits = _Buffer((slots, 1, self.vocab_size), np.dtype(np.float32), device)
            # One thread: on the processor two sessions' threads would wait by spinning on each other's cores.
            self._sampling_session: Any = open_graph(bundle, SAMPLING_GRAPH, device, 1)
            self._staying: dict[int, Any] = {}
            self._sampling_bindings: dict[int, Any] = {}
            self._rows = 0
        self._columns = np.arange(max_length)

    def prefill_chunk(self, slot: int, tokens: Sequence[int], start: int) -> FloatArray:
        """See `SlotBackend.prefill_chunk`."""
        if slot not in self._alone:
            self._alone[slot] = self._bind(self._prefill_session, slot, 1, self._prompt_logits)
        self._read(self._alone[slot], tokens, start)
        logits: FloatArray = self._prompt_logits[0, 0]
        return logits

    def score_chunk(self, slot: int, tokens: Sequence[int], start: int) -> FloatArray:
        """See `SlotBackend.score_chunk`."""
        count = len(tokens)
        if len(self._scored_logits) < count:
            self._scored_logits = np.empty((self.scored_tokens, 1, self.vocab_size), np.float32)
        logits: FloatArray = self._scored_logits[:count]
        if slot not in self._scoring:
            self._scoring[slot] = self._bind(self._prefill_session, slot, 1, logits)
        binding = self._scoring[slot]
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        binding.bind_cpu_input(OFFSETS, np.arange(count)[::-1].copy())
        self._read(binding, tokens, start)
        return logits[:, 0]

    def verify(self, slot: int, tokens: Sequence[int], start: int) -> FloatArray:
        """See `SlotBackend.verify`."""
        if self._verifier is None:
            return self._verify_chunk(slot, tokens, start)
        if slot not in self._verifying:
            addresses = [buffer.address(slot) for buffer in self._buffers]
            self._verifying[slot] = self._verifier.bind(addresses, self._row[1])
        return self._verifier.run(self._verifying[slot], tokens, start)

    def _verify_chunk(self, slot: int, tokens: Sequence[int], start: int) -> FloatArray:
        count = len(tokens)
        logits: FloatArray = self._verify_logits[:count]
        binding = self._chunks.get((slot, count))
        if binding is None:
            binding = self._chunks[slot, count] = self._bind(self._session, slot, 1, logits)
            binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
            binding.bind_cpu_input(OFFSETS, np.arange(count)[::-1].copy())
        self._read(binding, tokens, start)
        return logits[:, 0]

    def _read(self, binding: Any, tokens: Sequence[int], start: int) -> None:
        end = start + len(tokens)
        binding.bind_cpu_input("input_ids", np.array([tokens], np.int64))
        binding.bind_cpu_input("position_ids", np.arange(start, end)[None])
        binding.bind_cpu_input("attention_mask", np.ones((1, end), np.int64))
        self._prefill_session.run_with_iobinding(binding)

    def decode(self, tokens: IntArray, lengths: IntArray) -> FloatArray:
        """See `SlotBackend.decode`."""
        rows = len(tokens)
        if rows not in self._leading:
            self._leading[rows] = self._bind(self._session, 0, rows, self._logits)
        self._run(self._leading[rows], tokens, lengths)
        return self._logits[:rows, 0]

    def advance(self, tokens: IntArray, lengths: IntArray) -> None:
        """See `DeviceSamplingSlotBackend.advance`."""
        self._rows = rows = len(tokens)
        if rows not in self._staying:
            self._staying[rows] = self._bind(self._session, 0, rows, None)
        self._run(self._staying[rows], tokens, lengths)

    def sample_tokens(self, request: SamplingRequest) -> SampledTokens:
        """See `DeviceSamplingSlotBackend.sample_tokens`."""
        rows = self._rows
        if rows not in self._sampling_bindings:
            binding = self._sampling_bindings[rows] = self._sampling_session.io_binding()
            shape, address = (rows, 1, self.vocab_size), self._kept_logits.address(0)
            binding.bind_input("logits", *self._place, np.float32, shape, address)
        binding = self._sampling_bindings[rows]
        bind_sampling_request(binding, request)
        binding.clear_binding_outputs()
        for name in ("token", "exact"):
            binding.bind_output(name, "cpu")
        self._sampling_session.run_with_iobinding(binding)
        token, exact = (value.numpy() for value in binding.get_outputs())
        return SampledTokens(token[:, 0], exact)

    def logits(self) -> FloatArray:
        """See `DeviceSamplingSlotBackend.logits`."""
        logits: FloatArray = self._kept_logits.fetch()[: self._rows, 0]
        return logits

    def _run(self, binding: Any, tokens: IntArray, lengths: IntArray) -> None:
        mask = (self._columns[: int(lengths.max()) + 1] <= lengths[:, None]).astype(np.int64)
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(tokens[:, None], np.int64))
        binding.bind_cpu_input("position_ids", np.ascontiguousarray(lengths[:, None], np.int64))
        binding.bind_cpu_input("attention_mask", mask)
        self._session.run_with_iobinding(binding)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """See `SlotBackend.copy_prefix`."""
        for buffer in self._buffers:
            buffer.array[target, :, :length] = buffer.array[source, :, :length]

    def close(self) -> None:
        """See `SlotBackend.close`."""
        self._leading.clear()
        self._alone.clear()
        self._scoring.clear()
        self._verifying.clear()
        self._chunks.clear()
        self._buffers.clear()
        self._session = self._prefill_session = self._verifier = None
        if self.supports_device_sampling:
            self._staying.clear()
            self._sampling_bindings.clear()
            self._sampling_session = self._kept_logits = None  # type: ignore[assignment]

    def _bind(self, session: Any, first: int, rows: int, logits: FloatArray | None) -> Any:
        """A binding of `rows` slots from `first` on as past and present at once; without `logits`, those stay there."""
        binding = session.io_binding()
        if _takes_offsets(session):
            binding.bind_cpu_input(OFFSETS, _LAST)
        for name, buffer in zip(self._past, self._buffers, strict=True):
            place = (*self._place, buffer.dtype, (rows, *self._row), buffer.address(first))
            binding.bind_input(name, *place)
            binding.bind_output(name.replace("past_key_values", "present"), *place)
        shape = (rows, 1, self.vocab_size)
        if logits is None:
            binding.bind_output("logits", *self._place, np.float32, shape, self._kept_logits.address(0))
        else:
            binding.bind_output("logits", "cpu", 0, np.float32, shape, logits.ctypes.data)
        return binding


def _takes_offsets(session: Any) -> bool:
    return any(value.name == OFFSETS for value in session.get_inputs())


class _Buffer:
    """A row for each slot, for example of one block's keys: an `array` on a CPU, a device pointer elsewhere."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: str) -> None:
        self.dtype = dtype.type
        self._slot_bytes = int(np.prod(shape[1:])) * dtype.itemsize
        self.array = np.zeros(shape if device == "cpu" else (0,), dtype)
        self._value = None if device == "cpu" else device_zeros(shape, dtype, device)
        self._start: int = self.array.ctypes.data if self._value is None else self._value.data_ptr()

    def address(self, slot: int) -> int:
        return self._start + slot * self._slot_bytes

    def fetch(self) -> Any:
        """All of it as an array; on the processor the memory itself."""
        return self.array if self._value is None else self._value.numpy()
