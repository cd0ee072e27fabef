"""ONNX graphs whose initializers point into a copy of model.safetensors.

A safetensors file is a JSON header followed by raw little-endian tensors, and an ONNX initializer may point at any
offset of a file. So the graphs refer into the very bytes that `transformers` loads, and nothing passes through
protobuf. Each graph's folder has its own copy of the file, which takes no room where the file system shares blocks:
onnx refuses to load external data that lies outside of the graph's folder, or that has more than one hard link.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from builder.model.safetensors_file import WeightFile, clone_or_copy
from builder.onnx_export.trace import TracedGraph

EXTERNAL_DATA = "model.onnx_data"


def write_graph(traced: TracedGraph, weights: Path, path: Path) -> onnx.ModelProto:
    """Write `traced` to `path` with its weights as initializers that point into a copy of `weights` next to it.

    Returns what was written.
    """
    graph = onnx.ModelProto()
    graph.CopyFrom(traced.model)
    tensors = WeightFile(weights)
    weight_names = set(traced.weight_names)
    kept = []
    for value in graph.graph.input:
        if value.name not in weight_names:
            kept.append(value)
            continue
        offset, length = tensors.byte_range(value.name)
        tensor = graph.graph.initializer.add(
            name=value.name,
            data_type=value.type.tensor_type.elem_type,
            dims=[dim.dim_value for dim in value.type.tensor_type.shape.dim],
            data_location=onnx.TensorProto.EXTERNAL,
        )
        for key, entry in (("location", EXTERNAL_DATA), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(entry))
    del graph.graph.input[:]
    graph.graph.input.extend(kept)
    path.parent.mkdir(parents=True, exist_ok=True)
    clone_or_copy(weights, path.parent / EXTERNAL_DATA)
    path.write_bytes(graph.SerializeToString())
    return graph
