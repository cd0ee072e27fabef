"""A bundle's ONNX graphs in ONNX Runtime: the optimized one with a shared KV cache buffer, the portable one without.

Tensors stay bound between steps. A shared buffer is both past and present, so no step copies the KV cache. With the
sampling graph `ort/choose`, logits stay on the device, and the sampled tokens are the next step's input.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import onnxruntime as ort

from serving.backends.base import (
    FloatArray,
    IntArray,
    NextTokens,
    SampledTokens,
    SamplingRequest,
    check_capacity,
    check_room,
    pad_right,
)
from serving.backends.buffer_pool import SpareMemory
from serving.backends.devices import parse_device
from serving.backends.onnx_logits import OFFSETS, with_offsets
from serving.backends.onnx_multi_step import MultiStepDecoder
from serving.backends.onnx_session import (
    SAMPLING_GRAPH,
    bind_sampling_request,
    check_provider,
    device_zeros,
    open_graph,
    open_session,
)
from serving.backends.onnx_verify import VerifySession, open_verify_session
from serving.backends.prefill_graph import check_cache_layouts
from serving.backends.verify_steps import CHAIN, CHAIN_STEP, FP32_STEP, is_small, wants_verify_session
from serving.bundle import Bundle
from serving.errors import InputError

DEFAULT_GRAPH = "ort/fp32"
# Steps per fetch on CUDA: a stream delivers this many tokens at once, and wastes at most as many at its end.
CUDA_STEPS = 8
PREFILL_TOKENS = 1024
"""Maximum padded tokens of one prefill pass on a CPU, unless a single row has more. The activations of larger passes do
not fit the CPU's caches."""
PREFILL_COLUMNS = 384
"""Maximum tokens of a row in one prefill pass on a CPU, unless several rows share it. The kernel multiplies all queries
of a pass with all keys, also with those that a query does not see."""
_LAST = np.zeros(1, np.int64)
_CACHE_ROOM = 64
"""Granularity of KV cache allocations, in tokens. Untouched pages cost no memory."""


@dataclass
class OnnxState:
    """A batch that decodes: its lengths so far, [rows], and the binding that holds its KV cache.

    `values` are the tensors that stay on the device between steps: "logits", and "token", [rows, 1], the last sampled
    tokens, of which `sampled`, [rows], is the host's copy. `logits` is the memory of the former if it is a numpy array.
    """

    lengths: IntArray
    capacity: int
    mask: IntArray
    binding: Any
    cache: list[Any]
    values: dict[str, Any] = field(default_factory=dict)
    logits: FloatArray | None = None
    sampling_binding: Any = None
    verify_binding: Any = None
    sampled: IntArray | None = None


class OnnxBackend:
    """One ONNX graph of a bundle.

    Args:
        bundle: an opened bundle.
        graph_name: the graph's name in the manifest, such as "ort/fp32" or "onnx/portable".
        threads: intra-operator threads; None means ONNX Runtime's default, one for each physical core.
        device: "cpu", "cuda" or "cuda:N". Raises RuntimeMissingError if ONNX Runtime is not built for it here.
        steps_per_fetch: decode steps between two fetches of tokens, if the bundle has the graphs for multi-step decode
            and no row has penalties; None means 1 on a CPU and 8 on CUDA.
        cuda_graphs: whether CUDA graphs capture those steps, even with steps_per_fetch 1.
        speculation: whether to verify drafts where that gives the tokens of plain decoding.
        prefill_graph: another graph, with the same kind of KV cache, that runs the prompts, on a CPU; None means none.
    """

    def __init__(
        self,
        bundle: Bundle,
        graph_name: str = DEFAULT_GRAPH,
        threads: int | None = None,
        device: str = "cpu",
        steps_per_fetch: int | None = None,
        cuda_graphs: bool = True,
        speculation: bool = False,
        prefill_graph: str | None = None,
    ) -> None:
        geometry = bundle.manifest.model
        graph = bundle.graph(graph_name)
        if graph.cache == "none":
            raise InputError(f"{bundle.folder}: the graph {graph_name!r} is not a language model; ask for 'ort/fp32'")
        self.name, self.prefill_graph = graph_name, prefill_graph
        self._place = parse_device(device)
        self.device, self._device_name = self._place[0], device
        if prefill_graph is not None:
            check_cache_layouts(bundle, graph_name, prefill_graph)
            if self.device != "cpu":
                raise InputError(f"a prefill graph runs on the processor only, not on {device}")
        device_steps = 1 if self.device == "cpu" else CUDA_STEPS
        self.steps_per_fetch = device_steps if steps_per_fetch is None else steps_per_fetch
        if self.steps_per_fetch < 1:
            raise InputError(f"steps_per_fetch is {self.steps_per_fetch}; it must be at least 1")
        self._bundle, self._threads, self._speculation = bundle, threads, speculation
        self._capture = cuda_graphs and self.device != "cpu"
        self._loops: dict[bool, MultiStepDecoder | None] = {}
        self.vocab_size, self.n_positions = geometry.vocab_size, geometry.n_positions
        self._cache_shape = (geometry.n_head, graph.cache_head_dim(geometry))
        self._shared = graph.cache == "shared-buffer"
        if self.device != "cpu" and not self._shared:
            raise InputError(f"the graph {graph_name!r} runs on the processor only; ask for 'ort/fp32' on {device}")
        self.supports_device_sampling = self._shared and SAMPLING_GRAPH in bundle.manifest.graphs
        self._past = [name for name in graph.inputs if name.startswith("past_key_values.")]
        self._cache_dtype = np.dtype(graph.inputs[self._past[0]].dtype)
        self._present = [name.replace("past_key_values", "present") for name in self._past]
        self._cache_memory, self._logits_memory = SpareMemory(), SpareMemory()
        proven = self._shared and self.device == "cpu" and graph.precision == "fp32" and self.steps_per_fetch == 1
        proven = proven and prefill_graph is None
        self._prefill_session: Any = None
        """That of `prefill_graph`, if there is one."""
        if prefill_graph is not None:
            self._prefill_session = open_graph(bundle, prefill_graph, device, threads, spin=False)
        self._offsets = self._speculates = proven and speculation
        if self.device == "cpu":
            self._offsets = any(value.name == OFFSETS for value in self._session.get_inputs())
        else:
            check_provider(self.device)
        self._verifier: VerifySession | None = None
        if speculation and self.device == "cpu" and self.steps_per_fetch == 1 and not self._offsets:
            self._verifier = open_verify_session(bundle, graph_name, threads, self._session)
        self.verify_step = FP32_STEP if self._offsets else CHAIN_STEP if self._verifier else None
        """See `SpeculativeBackend.verify_step`."""
        self.draft_table: NextTokens | None = None
        self.pacing: Any = None
        # A chain also writes the positions of its padding.
        self._spare_positions = CHAIN if self._verifier is not None else 0

    @cached_property
    def _session(self) -> Any:
        """The session of a step. On CUDA it opens only for batches that multi-step decode cannot run."""
        width = self._bundle.manifest.model.n_embd
        edit = (lambda data: with_offsets(data, width)) if self._speculates else None
        two = self._speculation and wants_verify_session(self._bundle, self.name)
        spin = not two or is_small(self._bundle, self.name)
        return open_graph(self._bundle, self.name, self._device_name, self._threads, edit=edit, spin=spin)

    @cached_property
    def _sampling_session(self) -> Any:
        # Two spinning thread pools would compete for the cores at every step.
        return open_graph(self._bundle, SAMPLING_GRAPH, self._device_name, 1)

    def loop(self, sampled: bool) -> MultiStepDecoder | None:
        """Multi-step decode for greedy or for sampled batches; None if it is not wanted or not in the bundle.

        Its session opens at the first call.
        """
        if sampled not in self._loops:
            folder = self._bundle.graph(self.name).path.rpartition("/")[0]
            path = f"{folder}/{'sample' if sampled else 'greedy'}.onnx"
            # Its prefill is part of its first block.
            wanted = self._shared and self.prefill_graph is None and (self.steps_per_fetch > 1 or self._capture)
            if not wanted or path not in {artifact.path for artifact in self._bundle.manifest.artifacts}:
                self._loops[sampled] = None
            else:
                session = open_session(self._bundle, path, self._device_name, self._threads, self._capture)
                self._loops[sampled] = MultiStepDecoder(
                    session, self._place, self.n_positions, self.steps_per_fetch, self._capture
                )
        return self._loops[sampled]

    def prefill(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[OnnxState, FloatArray]:
        """See `Backend.prefill`."""
        state = self.open(prompts, capacity)
        return state, self.logits(state)

    def decode(self, state: OnnxState, tokens: IntArray) -> FloatArray:
        """See `Backend.decode`."""
        self.advance(state, tokens)
        return self.logits(state)

    def open(self, prompts: Sequence[Sequence[int]], capacity: int) -> OnnxState:
        """See `DeviceSamplingBackend.open`."""
        check_capacity(prompts, capacity, self.n_positions)
        token_ids, lengths = pad_right(prompts)
        rows, width = token_ids.shape
        mask = np.zeros((rows, capacity), np.int64)
        mask[:, :width] = np.arange(width) < lengths[:, None]
        state = OnnxState(lengths, capacity, mask, self._session.io_binding(), [])
        if self._offsets:
            state.binding.bind_cpu_input(OFFSETS, _LAST)
        state.cache = self._caches(rows, capacity + self._spare_positions if self._shared else 0)
        for name, value in zip(self._past, state.cache, strict=True):
            state.binding.bind_ortvalue_input(name, value)
        large = (rows > 1 and rows * width > PREFILL_TOKENS) or width > PREFILL_COLUMNS
        if (large and self._shared and self.device == "cpu") or self.prefill_graph is not None:
            self._open_in_parts(state, token_ids)
            return state
        positions = np.broadcast_to(np.arange(width), token_ids.shape)
        state.binding.bind_cpu_input("input_ids", token_ids)
        self._run(state, positions, width)
        if state.values["logits"].shape()[1] != 1:
            # The portable graph gives the logits of every position; keep each row's last one.
            logits = np.take_along_axis(state.values["logits"].numpy(), (lengths - 1)[:, None, None], axis=1)
            state.logits, state.values["logits"] = logits, ort.OrtValue.ortvalue_from_numpy(logits)
        return state

    def advance(self, state: OnnxState, tokens: IntArray) -> None:
        """See `DeviceSamplingBackend.advance`."""
        check_room(state.lengths, state.capacity)
        if self._shared:
            # The new token of each row follows the row's own last one.
            state.mask[np.arange(len(tokens)), state.lengths] = 1
            total = int(state.lengths.max()) + 1
        else:
            # Concatenation puts the new tokens of all rows in one column, after the padding of the widest row.
            total = state.cache[0].shape()[2] + 1
            if total > state.mask.shape[1]:
                state.mask = np.pad(state.mask, ((0, 0), (0, state.capacity)))
            state.mask[:, total - 1] = 1
        if state.sampled is not None and np.array_equal(tokens, state.sampled):
            state.binding.bind_ortvalue_input("input_ids", state.values["token"])
        else:
            state.binding.bind_cpu_input("input_ids", np.ascontiguousarray(tokens[:, None], np.int64))
        self._run(state, state.lengths[:, None], total)
        state.lengths += 1

    def verify(self, state: OnnxState, tokens: IntArray) -> FloatArray:
        """See `SpeculativeBackend.verify`."""
        count, start = len(tokens), int(state.lengths[0])
        check_room(state.lengths + count - 1, state.capacity)
        state.mask[0, start : start + count] = 1
        binding = state.verify_binding
        if self._verifier is not None:
            if binding is None:
                addresses = [value.data_ptr() for value in state.cache]
                binding = state.verify_binding = self._verifier.bind(addresses, state.cache[0].shape()[2])
            found = self._verifier.run(binding, tokens, start)
            state.lengths = state.lengths + count
            return found
        if binding is None:
            binding = state.verify_binding = self._session.io_binding()
            for past, present, value in zip(self._past, self._present, state.cache, strict=True):
                binding.bind_ortvalue_input(past, value)
                binding.bind_ortvalue_output(present, value)
        logits = np.empty((count, 1, self.vocab_size), np.float32)
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(tokens[None], np.int64))
        binding.bind_cpu_input("position_ids", np.arange(start, start + count)[None])
        binding.bind_cpu_input("attention_mask", np.ascontiguousarray(state.mask[:, : start + count]))
        binding.bind_cpu_input(OFFSETS, np.arange(count)[::-1].copy())
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._session.run_with_iobinding(binding)
        state.lengths = state.lengths + count
        return logits[:, 0]

    def rewind(self, state: OnnxState, length: int) -> None:
        """See `SpeculativeBackend.rewind`."""
        state.lengths = np.array([length], np.int64)

    def logits(self, state: OnnxState) -> FloatArray:
        """See `DeviceSamplingBackend.logits`."""
        # Neither an OrtValue over an array's memory nor its `numpy` keeps the array alive.
        logits: FloatArray = state.values["logits"].numpy() if state.logits is None else state.logits
        return logits[:, 0]

    def sample_tokens(self, state: OnnxState, request: SamplingRequest) -> SampledTokens:
        """See `DeviceSamplingBackend.sample_tokens`."""
        assert self.supports_device_sampling, "the bundle has no sampling graph; check `supports_device_sampling` first"
        if state.sampling_binding is None:
            state.sampling_binding = self._sampling_session.io_binding()
            state.values["token"] = device_zeros((len(state.lengths), 1), np.dtype(np.int64), self._device_name)
            state.sampling_binding.bind_ortvalue_input("logits", state.values["logits"])
        bind_sampling_request(state.sampling_binding, request)
        state.sampling_binding.clear_binding_outputs()
        state.sampling_binding.bind_ortvalue_output("token", state.values["token"])
        state.sampling_binding.bind_output("exact", "cpu")
        self._sampling_session.run_with_iobinding(state.sampling_binding)
        # A copy: the next call overwrites the memory.
        state.sampled = state.values["token"].numpy()[:, 0].copy()
        _, exact = state.sampling_binding.get_outputs()
        return SampledTokens(state.sampled, exact.numpy())

    def _run(self, state: OnnxState, positions: IntArray, total: int) -> None:
        """One pass over the bound `input_ids`; leaves `state.values["logits"]`."""
        binding = state.binding
        binding.bind_cpu_input("attention_mask", np.ascontiguousarray(state.mask[:, :total]))
        binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions, np.int64))
        if not self._shared:
            self._run_concatenated(state)
            return
        if "logits" not in state.values:
            self._bind_outputs(state)
        self._session.run_with_iobinding(binding)

    def _open_in_parts(self, state: OnnxState, token_ids: IntArray) -> None:
        """Prefill a few rows at a time, each part in its own rows of the shared buffers, and a long row in chunks."""
        self._bind_outputs(state)
        rows = max(1, PREFILL_TOKENS // token_ids.shape[1])
        for first in range(0, len(token_ids), rows):
            part = slice(first, first + rows)
            width = int(state.lengths[part].max())
            binding = self._bind_part(state, first, len(token_ids[part]))
            # Equal chunks, since a chunk of one token has other bits.
            chunks = -(-width // PREFILL_COLUMNS) if rows == 1 else 1
            for start, end in itertools.pairwise(width * chunk // chunks for chunk in range(chunks + 1)):
                tokens = np.ascontiguousarray(token_ids[part, start:end])
                positions = np.broadcast_to(np.arange(start, end), tokens.shape)
                binding.bind_cpu_input("input_ids", tokens)
                binding.bind_cpu_input("attention_mask", np.ascontiguousarray(state.mask[part, :end]))
                binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions, np.int64))
                (self._prefill_session or self._session).run_with_iobinding(binding)

    def _bind_part(self, state: OnnxState, first: int, rows: int) -> Any:
        """A binding of the prefill session over `rows` rows of the batch, from row `first` on."""
        session = self._prefill_session or self._session
        binding = session.io_binding()
        if any(value.name == OFFSETS for value in session.get_inputs()):
            binding.bind_cpu_input(OFFSETS, _LAST)
        for past, present, value in zip(self._past, self._present, state.cache, strict=True):
            place = ("cpu", 0, self._cache_dtype, *_stretch(value, first, rows))
            binding.bind_input(past, *place)
            binding.bind_output(present, *place)
        binding.bind_output("logits", "cpu", 0, np.float32, *_stretch(state.values["logits"], first, rows))
        return binding

    def _bind_outputs(self, state: OnnxState) -> None:
        """Allocate the logits, and bind them and the KV cache as outputs."""
        shape = (len(state.lengths), 1, self.vocab_size)
        if self.device == "cpu":
            state.logits = self._logits_memory.take(shape, np.dtype(np.float32))
            state.values["logits"] = ort.OrtValue.ortvalue_from_numpy(state.logits)
        else:
            state.values["logits"] = device_zeros(shape, np.dtype(np.float32), self._device_name)
        state.binding.bind_ortvalue_output("logits", state.values["logits"])
        for name, value in zip(self._present, state.cache, strict=True):
            state.binding.bind_ortvalue_output(name, value)

    def _run_concatenated(self, state: OnnxState) -> None:
        for name in ("logits", *self._present):
            state.binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(state.binding)
        state.logits = None
        state.values["logits"], *state.cache = state.binding.get_outputs()
        for name, value in zip(self._past, state.cache, strict=True):
            state.binding.bind_ortvalue_input(name, value)

    def _caches(self, rows: int, length: int) -> list[Any]:
        """The KV cache of every block, [rows, heads, length, head_dim], for `length` tokens.

        On a CPU its memory is not initialized: attention reads a row only up to the row's length.
        """
        heads, head_dim = self._cache_shape
        shape = (rows, heads, length, head_dim)
        if self.device != "cpu" or not self._shared:
            return [device_zeros(shape, self._cache_dtype, self._device_name) for _ in self._past]
        # Rounded up, so that a slightly longer batch can reuse the memory.
        room = rows * heads * -(-length // _CACHE_ROOM) * _CACHE_ROOM * head_dim
        memory = self._cache_memory.take((len(self._past), room), self._cache_dtype)
        size = rows * heads * length * head_dim
        return [ort.OrtValue.ortvalue_from_numpy(one[:size].reshape(shape)) for one in memory]


def _stretch(value: Any, first: int, rows: int) -> tuple[tuple[int, ...], int]:
    """Shape and address of `rows` rows of a tensor from row `first` on."""
    whole, *rest = value.shape()
    return (rows, *rest), value.data_ptr() + value.tensor_size_in_bytes() // whole * first
