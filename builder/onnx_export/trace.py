"""The weightless trace: one Keras model to an ONNX graph whose weights live outside of it.

The weights enter the trace as arguments, so TensorFlow and tf2onnx only ever see their shapes; conversion takes
seconds at any size. Afterwards each such input becomes an initializer that points into a weight file.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import tf2onnx

from builder.keras_backend import tf
from builder.model.gpt2 import GPT2, named_variables
from builder.onnx_export.kernels import OnnxKernels
from builder.onnx_export.markers import MarkerTable

OPSET = 18
# It warns of every marker's output that it does not know the shape of it; the markers' shapes are set by hand.
logging.getLogger("tf2onnx").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class TracedGraph:
    """A converted graph and the names of those of its inputs that are weights."""

    model: onnx.ModelProto
    weight_names: tuple[str, ...]


def cache_names(kind: str, n_layer: int) -> list[str]:
    """Names of the cache tensors, key before value, layer by layer; `kind` is "past_key_values" or "present"."""
    return [f"{kind}.{layer}.{part}" for layer in range(n_layer) for part in ("key", "value")]


def trace(
    model: GPT2,
    make_kernels: type[OnnxKernels],
    logits_shape: Sequence[str | int],
    past_axis: str,
    present_axis: str,
) -> TracedGraph:
    """Trace a cached step of `model` with the given kernels and convert it.

    Inputs: input_ids, attention_mask, position_ids (int64), past_key_values.N.key/value; outputs: logits,
    present.N.key/value. Axis names are symbolic; `past_axis` and `present_axis` name the cache's length.
    """
    geometry = model.geometry
    named = named_variables(model)
    order = {id(variable): index for index, (_, variable) in enumerate(named)}
    weight_order = [order[id(variable)] for variable in model.trainable_variables]
    n_cache = 2 * geometry.n_layer
    head_dim = make_kernels.cache_head_dim(geometry)
    cache_shape = [None, geometry.n_head, None, head_dim]
    signature = [
        tf.TensorSpec([None, None], tf.int64, name="input_ids"),
        tf.TensorSpec([None, None], tf.int64, name="attention_mask"),
        tf.TensorSpec([None, None], tf.int64, name="position_ids"),
        *[tf.TensorSpec(cache_shape, tf.float32, name=f"past_{index}") for index in range(n_cache)],
        # TensorFlow's graph optimizer makes zeros for every argument of a known size, so the sizes are told inside.
        *[
            tf.TensorSpec([None] * len(variable.shape), tf.float32, name=f"weight_{index}")
            for index, (_, variable) in enumerate(named)
        ],
    ]
    markers = MarkerTable()

    def step(input_ids: Any, attention_mask: Any, position_ids: Any, *rest: Any) -> list[Any]:
        past = [(rest[2 * layer], rest[2 * layer + 1]) for layer in range(geometry.n_layer)]
        weights = [tf.ensure_shape(rest[n_cache + index], named[index][1].shape) for index in weight_order]
        kernels = make_kernels(geometry, markers, past, attention_mask)
        logits, _ = model.stateless_call(weights, [], input_ids, position_ids=position_ids, kernels=kernels)
        present = [tensor for pair in kernels.present for tensor in pair]
        return [tf.identity(tensor) for tensor in (logits, *present)]

    converted, _ = tf2onnx.convert.from_function(
        tf.function(step),
        input_signature=signature,
        opset=OPSET,
        custom_op_handlers=markers.handlers(),
        # Named only where it is meant: given the choice, tf2onnx takes Microsoft's Range before the standard one.
        extra_opset=[onnx.helper.make_opsetid(domain, 1) for domain in make_kernels.domains],
    )
    _drop_unused_domains(converted)
    _settle(converted.graph)
    axes: dict[str, list[str | int]] = {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "position_ids": ["batch_size", "sequence_length"],
    }
    past = cache_names("past_key_values", geometry.n_layer)
    present = cache_names("present", geometry.n_layer)
    axes |= {name: ["batch_size", geometry.n_head, past_axis, head_dim] for name in past}
    inputs = [*axes, *[name for name, _ in named]]
    axes |= {name: list(variable.shape) for name, variable in named}
    axes |= {name: ["batch_size", geometry.n_head, present_axis, head_dim] for name in present}
    axes["logits"] = list(logits_shape)
    _rename(converted.graph, inputs, ["logits", *present])
    for value in [*converted.graph.input, *converted.graph.output]:
        if value.name in axes:
            _set_shape(value, axes[value.name])
    return TracedGraph(converted, tuple(name for name, _ in named))


def _drop_unused_domains(model: onnx.ModelProto) -> None:
    """Leave only the operator sets that a node is of; a runtime may refuse a graph over one that it does not have."""
    used = {node.domain for node in model.graph.node}
    for entry in list(model.opset_import):
        if entry.domain not in used:
            model.opset_import.remove(entry)


def _settle(graph: Any) -> None:
    """Make the graph a function of what it computes: no two equal constants or nodes, all in one order with one name.

    tf2onnx merges and sorts by the order of sets of strings, which is another one in each process, and does not find
    every pair of equals in each.
    """
    same: dict[str, str] = {}
    kept: dict[Any, Any] = {}
    for tensor in graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        same[tensor.name] = kept.setdefault((array.dtype.str, array.shape, array.tobytes()), tensor).name
    nodes: dict[Any, Any] = {}
    for node in graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
        attributes = sorted(each.SerializeToString(deterministic=True) for each in node.attribute)
        first = nodes.setdefault((node.domain, node.op_type, *node.input, *attributes, len(node.output)), node)
        same |= dict(zip(node.output, first.output, strict=True))
    ends = [same.get(value.name, value.name) for value in graph.output]
    _number(graph, _in_order(list(nodes.values()), ends), {tensor.name: tensor for tensor in kept.values()}, ends)


def _in_order(nodes: list[Any], ends: list[str]) -> list[Any]:
    """The nodes that `ends` depend on, each after what it reads, by a walk from the ends through inputs in order."""
    makers = {name: node for node in nodes for name in node.output}
    ordered: dict[int, Any] = {}
    waiting = [makers[name] for name in reversed(ends) if name in makers]
    while waiting:
        node = waiting[-1]
        missing = [makers[name] for name in node.input if name in makers and id(makers[name]) not in ordered]
        if missing:
            waiting.extend(reversed(missing))
            continue
        ordered[id(waiting.pop())] = node
    return list(ordered.values())


def _number(graph: Any, nodes: list[Any], constants: dict[str, Any], ends: list[str]) -> None:
    """Give `graph` these nodes, and the constants that they read, under names by their places."""
    names: dict[str, str] = {}
    tensors: list[Any] = []
    for index, node in enumerate(nodes):
        for name in node.input:
            if name in constants and name not in names:
                names[name] = f"constant_{len(tensors)}"
                tensors.append(constants[name])
        node.name = f"traced_{index}_{node.op_type}"
        names |= {name: f"{node.name}_{place}" for place, name in enumerate(node.output) if name}
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for tensor in tensors:
        tensor.name = names[tensor.name]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    stored = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in tensors]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(copies)
    graph.initializer.extend(stored)
    for value, name in zip(graph.output, ends, strict=True):
        value.name = names.get(name, name)


def _rename(graph: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give the graph's inputs and outputs their public names, by position."""
    original = [value.name for value in graph.input]
    if len(original) != len(inputs) or len(graph.output) != len(outputs):
        raise AssertionError(f"conversion changed the signature: {len(original)} inputs, {len(graph.output)} outputs")
    new_names = dict(zip(original, inputs, strict=True))
    new_names |= {value.name: name for value, name in zip(graph.output, outputs, strict=True)}
    for value in [*graph.input, *graph.output, *graph.value_info]:
        value.name = new_names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [new_names.get(name, name) for name in node.input]
        node.output[:] = [new_names.get(name, name) for name in node.output]


def _set_shape(value: Any, axes: Sequence[str | int]) -> None:
    shape = value.type.tensor_type.shape
    del shape.dim[:]
    for axis in axes:
        dim = shape.dim.add()
        if isinstance(axis, int):
            dim.dim_value = axis
        else:
            dim.dim_param = axis
