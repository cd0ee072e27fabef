"""Nodes of an ONNX graph, collected one call after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import helper, numpy_helper


class GraphBuilder:
    """Collects nodes; a call such as `b.node("Add", x, y)` appends one and returns the name of its output.

    Names begin with `prefix`, so that nodes can be added to a graph that has others.
    """

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def constant(self, value: Any, dtype: Any, label: str = "") -> str:
        """An initializer, one for all uses of the same value; `label` names one that is too long for its name."""
        array = np.array(value, dtype)
        what = label or "_".join(str(each) for each in array.ravel().tolist())
        name = f"{self.prefix}{array.dtype.name}_{what}_{array.ndim}"
        self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def add(self, kind: str, inputs: Sequence[str], output: str, domain: str = "", **attributes: Any) -> str:
        """Append a node that is named for its one output; return the output."""
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def node(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Append a node and return the name of its output, or a list of names."""
        names = [f"{self.prefix}{kind}_{len(self.nodes)}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=names[0], **attributes))
        return names[0] if outputs == 1 else names

    def name(self, value: str, output: str) -> None:
        """Give `value` the public name `output`."""
        self.nodes.append(helper.make_node("Identity", [value], [output], name=f"{self.prefix}{output}_out"))
