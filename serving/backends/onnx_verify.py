"""Verify steps of the bits of single-token steps: products over several tokens, attention one token at a time.

GroupQueryAttention has other kernels for several tokens of a sequence than for one. Here a graph is changed in memory
so that each attention becomes a chain of single-token ones over the same KV cache. Products of quantized graphs are
exact, or have the same bits for any number of rows, on most processors. `VerifySession.exact` tests that on this one.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.backends.onnx_logits import OFFSETS, with_offsets
from serving.backends.onnx_session import open_graph
from serving.backends.verify_steps import CHAIN, is_small, wants_verify_session
from serving.bundle import Bundle
from serving.errors import InputError
from serving.protobuf.onnx_model import INT32, INT64, MESSAGES
from serving.protobuf.tables import read_message

_log = logging.getLogger(__name__)

_STEP = ".step"
_CHECKED_LENGTHS = (3, 17, 40)


def with_chains(data: bytes, count: int) -> bytes | None:
    """The ONNX model `data` with each attention as a chain of `count` single-token ones; None if it has none.

    The model then takes exactly `count` tokens at batch 1. Each member of a chain has its own outputs for the KV cache,
    named after the model's with ".step0" and so on, all of which must be bound to the same memory.
    """
    model = MESSAGES["Model"]()
    try:
        read_message(data, model)
    except InputError:
        return None
    graph = model.graph
    outputs = {value.name: value for value in graph.output}
    nodes: list[Any] = []
    chains = 0
    for node in graph.node:
        step = _single_token_attention(node)
        if step is None:
            nodes.append(node)
            continue
        if not chains:
            nodes += _lengths(graph, step.input[5], step.input[6], count)
        chains += 1
        nodes += _chain(graph, outputs, node, step, count)
    if not chains:
        return None
    copies = [MESSAGES["Node"].FromString(node.SerializeToString()) for node in nodes]
    inner = [each for node in copies for attribute in node.attribute for each in attribute.g.node]
    used = {name for node in (*copies, *inner) for name in node.input}
    # ONNX Runtime warns of each one that nothing reads: those of the branches that are gone.
    kept = [each.SerializeToString() for each in graph.initializer if each.name in used]
    del graph.node[:], graph.value_info[:], graph.initializer[:]
    graph.node.extend(copies)
    graph.initializer.extend(MESSAGES["Tensor"].FromString(each) for each in kept)
    changed: bytes = model.SerializeToString()
    return changed


def _single_token_attention(node: Any) -> Any | None:
    """The attention of single-token steps that `node` is, or that an If has for them; None for any other node."""
    if node.op_type == "GroupQueryAttention":
        return node
    for attribute in node.attribute if node.op_type == "If" else ():
        inner = attribute.g.node
        if attribute.name == "else_branch" and len(inner) == 1 and inner[0].op_type == "GroupQueryAttention":
            return inner[0]
    return None


def _lengths(graph: Any, last: str, total: str, count: int) -> list[Any]:
    """Nodes that compute each member's last index and total length, for all chains."""
    graph.initializer.add(
        name="chain_sizes", data_type=INT64, dims=[count], raw_data=struct.pack(f"<{count}q", *[1] * count)
    )
    nodes = []
    for place in range(count):
        behind = f"chain_behind_{place}"
        graph.initializer.add(name=behind, data_type=INT32, raw_data=struct.pack("<i", count - 1 - place))
        nodes.append(_node("Sub", [last, behind], f"chain_last_{place}"))
        nodes.append(_node("Sub", [total, behind], f"chain_total_{place}"))
    return nodes


def _chain(graph: Any, outputs: dict[str, Any], node: Any, step: Any, count: int) -> list[Any]:
    name = node.output[0]
    parts, contexts = ([f"{name}_{what}_{place}" for place in range(count)] for what in ("part", "context"))
    split = _node("Split", [step.input[0], "chain_sizes"], parts[0], axis=1)
    split.output[:] = parts
    nodes, cache = [split], list(step.input[3:5])
    for place in range(count):
        member = MESSAGES["Node"].FromString(step.SerializeToString())
        member.name = f"{name}_{place}"
        member.input[0], member.input[3:5] = parts[place], cache
        member.input[5:7] = [f"chain_last_{place}", f"chain_total_{place}"]
        cache = list(node.output[1:3])
        if place < count - 1:
            for output in node.output[1:3]:
                value = graph.output.add()
                value.CopyFrom(outputs[output])
                value.name = f"{output}{_STEP}{place}"
            cache = [f"{output}{_STEP}{place}" for output in node.output[1:3]]
        member.output[:] = [contexts[place], *cache]
        nodes.append(member)
    return [*nodes, _node("Concat", contexts, name, axis=1)]


def _node(op_type: str, inputs: Sequence[str], output: str, **attributes: int) -> Any:
    node = MESSAGES["Node"](op_type=op_type, input=inputs, output=[output], name=f"chain_{output}")
    for name, value in attributes.items():
        # AttributeProto.INT is 2.
        data = MESSAGES["IntAttribute"](name=name, i=value, type=2).SerializeToString()
        node.attribute.add().MergeFromString(data)
    return node


def open_verify_session(bundle: Bundle, graph_name: str, threads: int | None, session: Any) -> VerifySession | None:
    """The `VerifySession` of a graph; None for one that takes none, or where it has other bits on this processor."""
    if not wants_verify_session(bundle, graph_name):
        return None
    verifier = VerifySession(bundle, graph_name, 1 if is_small(bundle, graph_name) else threads, session)
    if not verifier.exact:
        _log.info("%s decodes plainly: steps over several tokens have other bits on this processor", graph_name)
        return None
    return verifier


@dataclass(frozen=True)
class VerifyBinding:
    """The KV cache of one row, bound to a `VerifySession`, and the memory of the logits."""

    binding: Any
    logits: NDArray[np.float32]


class VerifySession:
    """A second session of a graph on the processor, for verify steps. It has its own copy of the weights.

    Args:
        bundle, graph_name, threads: as of the session of single-token steps.
        session: that session, to compare with.

    `exact` says whether both gave the same bits, in logits and KV cache, wherever they were compared.
    """

    def __init__(self, bundle: Bundle, graph_name: str, threads: int | None, session: Any) -> None:
        geometry, graph = bundle.manifest.model, bundle.graph(graph_name)
        self._past = [name for name in graph.inputs if name.startswith("past_key_values.")]
        self._dtype = np.dtype(graph.inputs[self._past[0]].dtype)
        self._heads = geometry.n_head, graph.cache_head_dim(geometry)
        self._vocab_size, self._last_position = geometry.vocab_size, geometry.n_positions - 1
        self._offsets = np.arange(CHAIN)[::-1].copy()
        self._session: Any = None
        changed = open_graph(
            bundle, graph_name, "cpu", threads, edit=lambda data: _edited(data, geometry.n_embd), spin=False
        )
        inputs = {value.name for value in changed.get_inputs()}
        outputs = [value.name for value in changed.get_outputs()]
        # A graph of other nodes stays as it was.
        self.exact = OFFSETS in inputs and any(_STEP in name for name in outputs)
        if self.exact:
            self._session, self._outputs = changed, [name for name in outputs if name.startswith("present.")]
            self.exact = self._compare(session, min(geometry.n_positions, 64))

    def bind(self, addresses: Sequence[int], length: int) -> VerifyBinding:
        """A binding over the KV cache of one row: its tensors, in the order of the graph, begin at `addresses` and have
        `length` positions."""
        binding = self._session.io_binding()
        shape = (1, self._heads[0], length, self._heads[1])
        binding.bind_cpu_input(OFFSETS, self._offsets)
        logits = np.empty((CHAIN, 1, self._vocab_size), np.float32)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        for name, address in zip(self._past, addresses, strict=True):
            binding.bind_input(name, "cpu", 0, self._dtype.type, shape, address)
            present = name.replace("past_key_values", "present")
            for output in self._outputs:
                if output == present or output.startswith(present + _STEP):
                    binding.bind_output(output, "cpu", 0, self._dtype.type, shape, address)
        return VerifyBinding(binding, logits)

    def run(self, bound: VerifyBinding, tokens: Sequence[int] | NDArray[np.int64], start: int) -> NDArray[np.float32]:
        """Append `tokens` (1 to CHAIN) after the first `start` positions; the logits after each, [tokens, vocab_size].

        The next call with the same binding writes into the same memory. The CHAIN - len(tokens) positions after the
        tokens get arbitrary contents. The KV cache must have room for them.
        """
        binding = bound.binding
        fed = np.zeros((1, CHAIN), np.int64)
        fed[0, : len(tokens)] = tokens
        binding.bind_cpu_input("input_ids", fed)
        # Padding may lie beyond the context, whose positions have no embedding.
        positions = np.minimum(np.arange(start, start + CHAIN), self._last_position)
        binding.bind_cpu_input("position_ids", positions[None])
        binding.bind_cpu_input("attention_mask", np.ones((1, start + CHAIN), np.int64))
        self._session.run_with_iobinding(binding)
        return bound.logits[: len(tokens), 0]

    def _compare(self, session: Any, room: int) -> bool:
        """Whether a few verify steps have the bits of single-token steps of `session`, in logits and KV cache."""
        rng = np.random.default_rng(0)
        takes_offsets = any(value.name == OFFSETS for value in session.get_inputs())
        for length in _CHECKED_LENGTHS:
            if length + CHAIN > room:
                continue
            tokens = rng.integers(0, self._vocab_size, length + CHAIN)
            single, several = ([np.zeros((1, self._heads[0], room, self._heads[1]), self._dtype) for _ in self._past]
                               for _ in range(2))  # fmt: skip
            for cache in (single, several):
                self._single(session, cache, tokens[:length], 0, takes_offsets)
            lines = [
                self._single(session, single, tokens[place : place + 1], place, takes_offsets)
                for place in range(length, length + CHAIN)
            ]
            binding = self.bind([each.ctypes.data for each in several], room)
            found = self.run(binding, tokens[length:], length)
            same = np.array_equal(found, np.stack(lines))
            if not same or not all(map(np.array_equal, single, several)):
                return False
        return True

    def _single(
        self, session: Any, cache: Sequence[NDArray[Any]], tokens: NDArray[np.int64], start: int, takes_offsets: bool
    ) -> NDArray[np.float32]:
        binding, end = session.io_binding(), start + len(tokens)
        logits = np.empty((1, 1, self._vocab_size), np.float32)
        for name, each in zip(self._past, cache, strict=True):
            place = ("cpu", 0, self._dtype.type, each.shape, each.ctypes.data)
            binding.bind_input(name, *place)
            binding.bind_output(name.replace("past_key_values", "present"), *place)
        if takes_offsets:
            binding.bind_cpu_input(OFFSETS, np.zeros(1, np.int64))
        binding.bind_cpu_input("input_ids", tokens[None].copy())
        binding.bind_cpu_input("position_ids", np.arange(start, end)[None])
        binding.bind_cpu_input("attention_mask", np.ones((1, end), np.int64))
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        session.run_with_iobinding(binding)
        line: NDArray[np.float32] = logits[0, 0]
        return line


def _edited(data: bytes, width: int) -> bytes:
    changed = with_chains(data, CHAIN)
    return data if changed is None else with_offsets(changed, width)
