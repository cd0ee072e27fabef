"""A graph on its way to another precision: its nodes taken one by one, its weights written to one data file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from builder.model.safetensors_file import WeightFile
from builder.onnx_export.calibration import Calibration
from builder.onnx_export.external_data import EXTERNAL_DATA
from builder.onnx_export.graph_builder import GraphBuilder

_ALIGNMENT = 64


class Rewriter(GraphBuilder):
    """One graph on its way to another precision, and the data file that its weights go to, one after the other."""

    def __init__(self, graph: Any, weight_names: Sequence[str], tensors: WeightFile, data: Any) -> None:
        super().__init__()
        self.graph, self.weight_names, self.tensors, self.data = graph, set(weight_names), tensors, data
        self.dims: dict[str, tuple[int, ...]] = {}
        self.gelus: set[str] = set()
        self.zeros: set[str] = set()
        self.last: set[str] = set()
        """Tensors of each row's last token alone."""
        self.calibration: Calibration | None = None
        self.int8_kv_cache = False
        self.widened: dict[str, str] = {}

    def rewrite(self) -> None:
        """Replace nodes and weights."""
        for node in self.graph.node:
            self.take(node)
        del self.graph.node[:]
        self.graph.node.extend(_needed(self.nodes, self.graph.output))
        used = {name for node in self.graph.node for name in reads(node)}
        for tensor in [each for each in self.graph.initializer if each.name not in used]:
            self.graph.initializer.remove(tensor)
        inputs = list(self.graph.input)
        del self.graph.input[:]
        for value in inputs:
            if value.name not in self.weight_names:
                self.graph.input.append(value)
            elif value.name in used:
                self.external(value.name, self.plain(self.tensors.get_tensor(value.name)))

    def take(self, node: Any) -> None:
        """Append what stands for `node`: here the node itself."""
        self.nodes.append(node)

    def plain(self, tensor: NDArray[np.float32]) -> NDArray[Any]:
        """The stored form of a weight that no node replaces."""
        return tensor

    def external(self, name: str, array: NDArray[Any]) -> str:
        """Append `array` to the data file as the initializer `name`; return the name."""
        self.data.write(bytes(-self.data.tell() % _ALIGNMENT))
        tensor = self.graph.initializer.add(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            dims=array.shape,
            data_location=TensorProto.EXTERNAL,
        )
        entries = {"location": EXTERNAL_DATA, "offset": self.data.tell(), "length": array.nbytes}
        for key, entry in entries.items():
            tensor.external_data.add(key=key, value=str(entry))
        self.data.write(np.ascontiguousarray(array).data)
        self.dims[name] = array.shape
        return name

    def again(self, name: str, stored: str, shape: tuple[int, ...]) -> None:
        """Add the initializer `name`: the bytes of the one named `stored` in another shape."""
        (tensor,) = (each for each in self.graph.initializer if each.name == stored)
        second = self.graph.initializer.add()
        second.CopyFrom(tensor)
        second.name, second.dims[:] = name, shape

    def small(self, name: str, array: Any) -> str:
        """Add a small initializer inside the graph, if it is not there yet; return the name."""
        if name not in self.dims:
            self.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
            self.dims[name] = np.shape(array)
        return name


def reads(node: Any) -> set[str]:
    """What a node takes as input, its branches' nodes among them."""
    branches = (attribute.g for attribute in node.attribute if attribute.HasField("g"))
    return {*node.input, *(name for branch in branches for inner in branch.node for name in reads(inner))}


def _needed(nodes: Sequence[Any], outputs: Sequence[Any]) -> list[Any]:
    """The nodes that an output of the graph hangs on, in their order."""
    wanted = {value.name for value in outputs}
    kept = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(reads(node))
            kept.append(node)
    return kept[::-1]
