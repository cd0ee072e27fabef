"""The optimised graph in other precisions: the traced fp32 graph with its products and its token table replaced.

int8: a product's input is quantised by row (absmax / 127, around a zero point of 128) and its matrix by column, so that
a row's result never depends on its company; the sums are exact integers. int4: the blocks' matrices in 4 bits
(`MatMulNBits`), the head as in int8. In both, embedding and head read one int8 table. fp16: every float.

Weights are read, quantised and written one at a time, so nothing of the model's size is held in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from builder.onnx_markers import MICROSOFT
from builder.quantise import BLOCK, int4_by_block, int8_by_axis
from builder.tracing import TracedGraph
from builder.weights import EXTERNAL_DATA, WeightFile

TOKEN_TABLE = "transformer.wte.weight"
_ALIGNMENT = 64
GELU_DEPTH = np.float32(0.1701)
"""GELU's least value in its tanh form is -0.17004, at -0.7525."""


def write_variant(traced: TracedGraph, weights: Path, precision: str, path: Path) -> onnx.ModelProto:
    """Write `traced`, the optimised graph, to `path` in `precision` ("int8", "int4", "fp16"), and return it.

    Its weights come from the safetensors file `weights` and go into one data file beside `path`.
    """
    model = onnx.ModelProto()
    model.CopyFrom(traced.model)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / EXTERNAL_DATA).open("xb") as data:
        _REWRITERS[precision](model.graph, traced.weight_names, WeightFile(weights), data).rewrite()
    path.write_bytes(model.SerializeToString())
    return model


class _Rewriter:
    """One graph on its way to another precision, and the data file that its weights go to, one after the other."""

    def __init__(self, graph: Any, weight_names: Sequence[str], tensors: WeightFile, data: Any) -> None:
        self.graph, self.weight_names, self.tensors, self.data = graph, set(weight_names), tensors, data
        self.nodes: list[Any] = []
        self.dims: dict[str, tuple[int, ...]] = {}
        self.gelus: set[str] = set()
        self.zeros: set[str] = set()

    def rewrite(self) -> None:
        """Replace nodes and weights."""
        for node in self.graph.node:
            self.take(node)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input}
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
        """What is stored of a weight that no node has another form of."""
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

    def constant(self, name: str, array: Any) -> str:
        """Add a small initializer inside the graph, if it is not there yet; return the name."""
        if name not in self.dims:
            self.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
            self.dims[name] = np.shape(array)
        return name

    def node(self, op_type: str, inputs: Sequence[str], output: str, domain: str = "", **attributes: Any) -> str:
        """Append a node that is named for its one output; return the output."""
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=output, domain=domain, **attributes))
        return output


class _Int8(_Rewriter):
    """Products as QGemm and the token table in int8; everything else stays float32."""

    def take(self, node: Any) -> None:
        if node.op_type == "Gemm":
            self.product(node)
        elif node.op_type == "Gather" and node.input[0] == TOKEN_TABLE:
            self.embedding(node.input[1], node.output[0])
        else:
            if node.op_type == "FastGelu":
                self.gelus.add(node.output[0])
            self.nodes.append(node)

    def matrix(self, name: str, axis: int) -> tuple[str, str]:
        """Store a weight in int8 with scales over `axis`, once; return the names of values and scales."""
        values, scales = f"{name}_int8", f"{name}_scale"
        if values not in self.dims:
            quantised, by_line = int8_by_axis(self.tensors.get_tensor(name), axis)
            self.external(values, quantised)
            self.external(scales, by_line)
        return values, scales

    def embedding(self, ids: str, output: str) -> None:
        """Rows of the int8 table, widened: ids [batch, sequence] to [batch, sequence, n_embd]."""
        values, scales = self.matrix(TOKEN_TABLE, axis=1)
        rows = self.node("Gather", [values, ids], f"{output}_int8")
        rows = self.node("Cast", [rows], f"{output}_float", to=TensorProto.FLOAT)
        row_scales = self.node("Gather", [scales, ids], f"{output}_scale")
        row_scales = self.node("Unsqueeze", [row_scales, self.constant("last_axis", [-1])], f"{output}_column")
        self.node("Mul", [rows, row_scales], output)

    def product(self, node: Any) -> None:
        """[rows, inputs] by [inputs, outputs], or by its transpose as the table is stored, plus the bias.

        QGemm knows one scale of its left side, not one a row: it is given 1, and the rows are scaled afterwards.
        """
        (output,) = node.output
        transposed: bool = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        matrix, scales = self.matrix(node.input[1], axis=int(transposed))
        values, row_scales = self.by_row(node.input[0], transposed)
        left = [values, self.constant("one", np.float32(1)), self.constant("zero_point", np.uint8(128))]
        zeros = f"{matrix}_zero"
        if zeros not in self.dims:
            self.external(zeros, np.zeros(self.dims[scales], np.int8))
        unscaled = self.node(
            "QGemm", [*left, matrix, scales, zeros], f"{output}_unscaled", MICROSOFT, transB=int(transposed)
        )
        has_bias = len(node.input) > 2
        product = self.node("Mul", [unscaled, row_scales], f"{output}_product" if has_bias else output)
        if has_bias:
            self.node("Add", [product, node.input[2]], output)

    def by_row(self, name: str, head: bool) -> tuple[str, str]:
        """Quantise [rows, width] to uint8 around 128: the names of the values, and of the scales as [rows, 1].

        Behind GELU the largest value stands for the absmax. Elsewhere a row of zeros gets a scale of 0, and whatever
        its values become, times 0 they are zeros again.
        """
        last = self.constant("last_axis", [-1])
        if name in self.gelus:
            # GELU falls no lower than -0.17, so where a row's largest value is less than that, this is a bound of its
            # absmax; everywhere else it is the absmax, without a pass over the widest of all tensors for Abs.
            largest = self.node("ReduceMax", [name, last], f"{name}_top", keepdims=0)
            largest = self.node("Max", [largest, self.constant("gelu_depth", GELU_DEPTH)], f"{name}_max")
        else:
            largest = self.node("ReduceMax", [self.node("Abs", [name], f"{name}_abs"), last], f"{name}_max", keepdims=0)
        scale = self.node("Mul", [largest, self.constant("one_over_127", np.float32(1 / 127))], f"{name}_scale")
        values = self.node("QuantizeLinear", [name, scale, self.zero_points(scale, head)], f"{name}_uint8", axis=0)
        return values, self.node("Unsqueeze", [scale, last], f"{name}_column")

    def zero_points(self, scale: str, head: bool) -> str:
        """128 for each row. All blocks' products have the same rows and so share one tensor; the head's has fewer."""
        name = "head_zero_points" if head else "zero_points"
        if name not in self.zeros:
            self.zeros.add(name)
            around = numpy_helper.from_array(np.array([128], np.uint8))
            self.node("ConstantOfShape", [self.node("Shape", [scale], f"{name}_rows")], name, value=around)
        return name


class _Int4(_Int8):
    """The blocks' matrices in 4 bits by block; embedding and head as in int8."""

    def product(self, node: Any) -> None:
        if node.input[1] == TOKEN_TABLE:
            super().product(node)
            return
        name, bias = node.input[1], node.input[2]
        matrix = self.tensors.get_tensor(name)
        packed, scales = int4_by_block(matrix)
        values = [self.external(f"{name}_int4", packed), self.external(f"{name}_scale", scales)]
        self.node(
            "MatMulNBits", [node.input[0], *values, "", "", bias], node.output[0], MICROSOFT,
            K=matrix.shape[0], N=matrix.shape[1], bits=4, block_size=BLOCK, accuracy_level=4,
        )  # fmt: skip


class _Fp16(_Rewriter):
    """Weights, caches and all between in 16 bits; the logits are widened, since who samples from them expects it."""

    def rewrite(self) -> None:
        super().rewrite()
        for node in self.graph.node:
            node.output[:] = ["logits_fp16" if name == "logits" else name for name in node.output]
        self.graph.node.add(
            op_type="Cast", name="logits", input=["logits_fp16"], output=["logits"],
            attribute=[helper.make_attribute("to", TensorProto.FLOAT)],
        )  # fmt: skip
        for value in [*self.graph.input, *self.graph.output, *self.graph.value_info]:
            tensor = value.type.tensor_type
            if tensor.elem_type == TensorProto.FLOAT and value.name != "logits":
                tensor.elem_type = TensorProto.FLOAT16

    def plain(self, tensor: NDArray[np.float32]) -> NDArray[Any]:
        return tensor.astype(np.float16)


_REWRITERS = {"int8": _Int8, "int4": _Int4, "fp16": _Fp16}
PRECISIONS = tuple(_REWRITERS)
