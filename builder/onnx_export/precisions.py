"""The optimized graph in other precisions: the traced fp32 graph with its products and its token table replaced.

int8: a product's input is quantized by row (absmax / 127, around a zero point of 128) and its matrix by column, so that
a row's result never depends on its company; the sums are exact integers. int4: all matrices in 4 bits (`MatMulNBits`).
In both, embedding and head read one table. int8 and int4 may keep their caches in int8 too. fp16: every float.

Weights are read, quantized and written one at a time, so nothing of the model's size is held in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from builder.model.safetensors_file import WeightFile
from builder.onnx_export.calibration import Calibration
from builder.onnx_export.external_data import EXTERNAL_DATA
from builder.onnx_export.graph_rewriter import Rewriter
from builder.onnx_export.int8_kv_cache import OPSET, Int8Attention
from builder.onnx_export.markers import MICROSOFT
from builder.onnx_export.quantization import BLOCK, int4_by_block, int8_by_axis
from builder.onnx_export.trace import TracedGraph

TOKEN_TABLE = "transformer.wte.weight"
BLOCKED_OPSET = 21
"""The first whose QuantizeLinear takes blocks."""
TABLE_DAMPING = 1.0
"""The head's table is the embedding too, whose rows are used as they are; so they may move less than other matrices."""
GELU_DEPTH = np.float32(0.1701)
"""GELU's least value in its tanh form is -0.17004, at -0.7525."""


def write_variant(
    traced: TracedGraph,
    weights: Path,
    precision: str,
    path: Path,
    calibration: Calibration | None = None,
    int8_kv_cache: bool = False,
) -> onnx.ModelProto:
    """Write `traced`, the optimized graph, to `path` in `precision` ("int8", "int4", "fp16"), and return it.

    Its weights come from the safetensors file `weights` and go into one data file next to `path`. `calibration` says
    what the matrices are multiplied with, which int4 rounds for; without it, it rounds to the nearest. `int8_kv_cache`
    needs it, for their scales.
    """
    model = onnx.ModelProto()
    model.CopyFrom(traced.model)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / EXTERNAL_DATA).open("xb") as data:
        rewriter = _REWRITERS[precision](model.graph, traced.weight_names, WeightFile(weights), data)
        rewriter.calibration, rewriter.int8_kv_cache = calibration, int8_kv_cache
        rewriter.rewrite()
    if precision != "fp16":
        (standard,) = (entry for entry in model.opset_import if entry.domain == "")
        standard.version = OPSET if int8_kv_cache else BLOCKED_OPSET
        model.ir_version = max(model.ir_version, helper.find_min_ir_version_for([standard]))
    path.write_bytes(model.SerializeToString())
    return model


class _Int8(Rewriter):
    """Products as QGemm and the token table in int8; everything else stays float32, but caches may be int8 too."""

    attention_maker: Int8Attention | None = None

    def rewrite(self) -> None:
        # Logits of [rows, 1, vocabulary] come from the head as such, since a node that only widens them copies them.
        self.widened = {node.input[0]: node.output[0] for node in self.graph.node if node.output[0] == "logits"}
        super().rewrite()
        if self.attention_maker is not None:
            self.graph.initializer.extend(self.attention_maker.shared.constants.values())
            for value in [*self.graph.input, *self.graph.output]:
                if value.name.startswith(("past_key_values.", "present.")):
                    value.type.tensor_type.elem_type = TensorProto.INT8

    def take(self, node: Any) -> None:
        if node.op_type == "GatherND" or not self.last.isdisjoint(node.input):
            self.last.update(node.output)
        if node.op_type == "Gemm":
            self.product(node)
        elif node.op_type == "Gather" and node.input[0] == TOKEN_TABLE:
            self.embedding(node.input[1], node.output[0])
        elif node.op_type == "GroupQueryAttention" and self.int8_kv_cache:
            self.attention(node)
        elif node.output[0] not in self.widened.values():
            if node.op_type == "FastGelu":
                self.gelus.add(node.output[0])
            self.nodes.append(node)

    def attention(self, node: Any) -> None:
        """GroupQueryAttention with caches in int8, and a scale for each channel of each head."""
        assert self.calibration is not None, "int8 caches need the ranges of keys and values"
        block = node.input[3].split(".")[1]
        names, scales = [], []
        for part, largest in zip(("key", "value"), self.calibration.largest(int(block)), strict=True):
            scales.append(np.where(largest > 0, largest, 1).astype(np.float32) / np.float32(127))
            names.append(self.external(f"present.{block}.{part}_scale", scales[-1][None, :, None, :]))
        per_step = self.external(f"present.{block}.per_step", np.float32(1) / np.concatenate(scales).ravel())
        if self.attention_maker is None:
            self.attention_maker = Int8Attention(*scales[0].shape)
            self.nodes.extend(self.attention_maker.shared.nodes)
        self.nodes.append(self.attention_maker.attend(node, names[0], names[1], per_step))

    def matrix(self, name: str, axis: int) -> tuple[str, str]:
        """Store a weight in int8 with scales over `axis`, once; return the names of values and scales."""
        values, scales = f"{name}_int8", f"{name}_scale"
        if values not in self.dims:
            quantized, by_line = int8_by_axis(self.tensors.get_tensor(name), axis)
            self.external(values, quantized)
            self.external(scales, by_line)
        return values, scales

    def embedding(self, ids: str, output: str) -> None:
        """Rows of the int8 table, widened: ids [batch, sequence] to [batch, sequence, n_embd]."""
        values, scales = self.matrix(TOKEN_TABLE, axis=1)
        rows = self.add("Gather", [values, ids], f"{output}_int8")
        rows = self.add("Cast", [rows], f"{output}_float", to=TensorProto.FLOAT)
        row_scales = self.add("Gather", [scales, ids], f"{output}_scale")
        row_scales = self.add("Unsqueeze", [row_scales, self.small("last_axis", [-1])], f"{output}_column")
        self.add("Mul", [rows, row_scales], output)

    def product(self, node: Any) -> None:
        """[rows, inputs] by [inputs, outputs], or by its transpose as the table is stored, plus the bias.

        QGemm knows one scale of its left side, not one a row: it is given 1, and the rows are scaled afterwards.
        """
        (output,) = node.output
        transposed: bool = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        matrix, scales = self.matrix(node.input[1], axis=int(transposed))
        values, row_scales = self.by_row(node.input[0], self.dims[matrix][int(transposed)])
        left = [values, self.small("one", np.float32(1)), self.small("zero_point", np.uint8(128))]
        zeros = f"{matrix}_zero"
        if zeros not in self.dims:
            self.external(zeros, np.zeros(self.dims[scales], np.int8))
        unscaled = self.add(
            "QGemm", [*left, matrix, scales, zeros], f"{output}_unscaled", domain=MICROSOFT, transB=int(transposed)
        )
        if output in self.widened:
            first = self.small("first_axis", [1])
            unscaled = self.add("Unsqueeze", [unscaled, first], f"{output}_wide")
            row_scales = self.add("Unsqueeze", [row_scales, first], f"{row_scales}_wide")
            output = self.widened[output]
        has_bias = len(node.input) > 2
        product = self.add("Mul", [unscaled, row_scales], f"{output}_product" if has_bias else output)
        if has_bias:
            self.add("Add", [product, node.input[2]], output)

    def by_row(self, name: str, width: int) -> tuple[str, str]:
        """Quantize [rows, width] to uint8 around 128: the names of the values, and of the scales, [rows, 1].

        Each row is one block: QuantizeLinear divides blocks among all threads, and rows of `axis=0` it does not.

        After GELU, the largest value stands for the absmax. Elsewhere a row of zeros gets a scale of 0, and whatever
        its values become, times 0 they are zeros again.
        """
        last = self.small("last_axis", [-1])
        if name in self.gelus:
            # GELU falls no lower than -0.17, so where a row's largest value is less than that, this is a bound of its
            # absmax; everywhere else it is the absmax, without a pass over the widest of all tensors for Abs.
            largest = self.add("ReduceMax", [name, last], f"{name}_top")
            largest = self.add("Max", [largest, self.small("gelu_depth", GELU_DEPTH)], f"{name}_max")
        else:
            largest = self.add("ReduceMax", [self.add("Abs", [name], f"{name}_abs"), last], f"{name}_max")
        scale = self.add("Mul", [largest, self.small("one_over_127", np.float32(1 / 127))], f"{name}_scale")
        zero_points = self.zero_points(scale, name in self.last)
        values = self.add("QuantizeLinear", [name, scale, zero_points], f"{name}_uint8", axis=1, block_size=width)
        return values, scale

    def zero_points(self, scale: str, few: bool) -> str:
        """128 for each row. Products share one tensor where they have the same rows; the last ones have fewer."""
        name = "last_zero_points" if few else "zero_points"
        if name not in self.zeros:
            self.zeros.add(name)
            around = numpy_helper.from_array(np.array([128], np.uint8))
            self.add("ConstantOfShape", [self.add("Shape", [scale], f"{name}_rows")], name, value=around)
        return name


class _Int4(_Int8):
    """All matrices in 4 bits by block, each rounded for what it is multiplied with.

    Embedding and head read one table, which is int8's where a block would reach over the end of its rows.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.same: dict[str, str] = {}

    def rewrite(self) -> None:
        super().rewrite()
        del self.graph.value_info[:]

    def take(self, node: Any) -> None:
        if node.op_type == "Reshape":
            # From [batch, sequence, width] to [rows, width] and back, which these products need not.
            self.same[node.output[0]] = self.same.get(node.input[0], node.input[0])
            return
        node.input[:] = [self.same.get(name, name) for name in node.input]
        super().take(node)

    def embedding(self, ids: str, output: str) -> None:
        width = self.tensors.shape(TOKEN_TABLE)[1]
        if width % BLOCK:
            super().embedding(ids, output)
            return
        # The table is written when the head asks for it, as the second shape of the same bytes.
        self.add(
            "GatherBlockQuantized", [f"{TOKEN_TABLE}_rows", ids, f"{TOKEN_TABLE}_scale"], output, domain=MICROSOFT,
            bits=4, block_size=BLOCK, gather_axis=0, quantize_axis=1,
        )  # fmt: skip

    def product(self, node: Any) -> None:
        name, (output,) = node.input[1], node.output
        head = name == TOKEN_TABLE
        matrix = self.tensors.get_tensor(name)
        if head and matrix.shape[1] % BLOCK:
            super().product(node)
            return
        moments = None if self.calibration is None else self.calibration.moments(name)
        packed, scales = int4_by_block(matrix.T, moments, TABLE_DAMPING) if head else int4_by_block(matrix, moments)
        values = [self.external(f"{name}_int4", packed), self.external(f"{name}_scale", scales)]
        left, bias = node.input[0], [] if head else ["", "", node.input[2]]
        if head:
            self.again(f"{name}_rows", values[0], (len(packed), packed[0].size))
        if output in self.widened:
            left = self.add("Unsqueeze", [left, self.small("first_axis", [1])], f"{left}_wide")
            output = self.widened[output]
        self.add(
            "MatMulNBits", [left, *values, *bias], output, domain=MICROSOFT,
            K=matrix.shape[int(head)], N=matrix.shape[1 - int(head)], bits=4, block_size=BLOCK, accuracy_level=4,
        )  # fmt: skip


class _Fp16(Rewriter):
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
