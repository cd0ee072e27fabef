"""Marker operations: TensorFlow nodes that tf2onnx turns into exactly the ONNX node that was asked for.

A marker is a `tf.numpy_function` that is never run. Its token names an entry of a `MarkerTable`, and the table's
handler replaces the node during conversion. No pattern matching is involved, and the graph holds exactly the node that
was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from builder.keras_backend import tf

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class _Marker:
    op_type: str
    domain: str
    inputs: tuple[int | None, ...]
    attributes: dict[str, Any]


@dataclass
class MarkerTable:
    """The markers of one trace, keyed by the TensorFlow node's name."""

    markers: dict[str, _Marker] = field(default_factory=dict)

    def emit(
        self,
        op_type: str,
        inputs: Sequence[Any],
        outputs: Sequence[tf.TensorSpec],
        *,
        domain: str = "",
        **attributes: Any,
    ) -> list[Any]:
        """Place one ONNX node in the trace and return its outputs as tensors of the given specs.

        `inputs` may hold None where the ONNX operator has an optional input that is left out.
        """
        tensors = [tensor for tensor in inputs if tensor is not None]
        order: list[int | None] = []
        for tensor in inputs:
            order.append(None if tensor is None else sum(1 for index in order if index is not None))
        name = f"onnx_marker_{len(self.markers)}_{op_type}"
        results = tf.numpy_function(_never_run, tensors, [spec.dtype for spec in outputs], name=name)
        results = list(results) if isinstance(results, (list, tuple)) else [results]
        for result, spec in zip(results, outputs, strict=True):
            result.set_shape(spec.shape)
        self.markers[name] = _Marker(op_type, domain, tuple(order), attributes)
        return results

    def handlers(self) -> dict[str, tuple[Any, list[Any]]]:
        """The `custom_op_handlers` argument for tf2onnx."""
        return {"PyFunc": (self._convert, [])}

    def _convert(self, graph: Any, node: Any, name: str, args: Any) -> Any:
        marker = self.markers[next(part for part in reversed(name.split("/")) if part in self.markers)]
        shapes, dtypes = node.output_shapes, node.output_dtypes
        inputs = ["" if index is None else node.input[index] for index in marker.inputs]
        outputs = list(node.output)
        graph.remove_node(node.name)
        return graph.make_node(
            marker.op_type,
            inputs,
            name=node.name,
            outputs=outputs,
            shapes=shapes,
            dtypes=dtypes,
            domain=marker.domain,
            attr=marker.attributes,
        )


def _never_run(*tensors: Any) -> Any:
    raise RuntimeError("a marker node was run by TensorFlow; it exists only to be converted to ONNX")
