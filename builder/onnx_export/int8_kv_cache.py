"""Attention on caches in int8, in two branches: a step reads them as they are, a prompt reads them widened.

ONNX Runtime's kernel for such caches widens each key once for every query, which is right for a step and made prompts
a third slower. So where there is more than one new token per row, the new keys and values are rounded and written
into the caches by nodes of their own, what the caches hold is widened once, and the float32 kernel attends to that.
It sees the rounded keys and values of the prompt itself too, so chunked prefill gives the bits of one prefill.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from builder.onnx_export.graph_builder import GraphBuilder
from builder.onnx_export.markers import MICROSOFT

OPSET = 24
"""The first with TensorScatter."""
_SCALES = 12  # GroupQueryAttention's place for k_scale; v_scale follows it.
_ANY_LENGTH = 1 << 20  # A block of DequantizeLinear that no KV cache is longer than.
_SINK = 11
# A sink that takes no share of the attention. With one, ONNX Runtime multiplies whole matrices; without, it goes
# through them in tiles, which for prompts of some hundred tokens takes longer.
_NO_SHARE = -1e30


def cache_scales(path: Path) -> dict[str, NDArray[Any]]:
    """The scales of an ONNX file's KV cache by name, such as "present.0.key_scale"; empty for one in float32."""
    scales = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.name.startswith("present.") and tensor.name.endswith("_scale"):
            external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
            scales[tensor.name] = numpy_helper.to_array(tensor)
    return scales


class Int8Attention:
    """Makes a block's nodes; what all blocks share is in `shared`, and comes before the first of them."""

    def __init__(self, heads: int, head_dim: int) -> None:
        self.heads, self.head_dim = heads, head_dim
        self.shared = GraphBuilder("prompt_")
        axis = self.shared.constant(1, np.int64)
        self._columns = self.shared.node("Shape", "input_ids", start=1, end=2)
        self._is_prompt = self.shared.node("Greater", self._columns, axis)
        rows = self.shared.node("Shape", "input_ids", start=0, end=1)
        self._per_row = self.shared.node("Concat", rows, self._constant([1, 1, 1]), axis=0)

    def attend(self, node: Any, key_scale: str, value_scale: str, per_step: str) -> Any:
        """The node for the GroupQueryAttention `node`, whose caches are int8 now.

        `key_scale` and `value_scale` are [1, heads, 1, head_dim]; `per_step` is one over both, [2 * heads * head_dim].
        """
        step = _copy(node)
        step.input.extend([""] * (_SCALES - len(step.input)) + [key_scale, value_scale])
        types = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        step.attribute.extend(helper.make_attribute(key, value) for key, value in types.items())
        step.output[:] = [f"{name}_step" for name in node.output]
        prompt, outputs = self._prompt(node, key_scale, value_scale, per_step)
        return helper.make_node(
            "If", [self._is_prompt], list(node.output), name=node.name,
            then_branch=_branch(f"{node.name}_prompt", prompt, outputs),
            else_branch=_branch(f"{node.name}_step", [step], list(step.output)),
        )  # fmt: skip

    def _prompt(self, node: Any, key_scale: str, value_scale: str, per_step: str) -> tuple[list[Any], list[str]]:
        qkv, _, _, past_key, past_value, last, total = node.input[:7]
        b, constant, width = GraphBuilder(f"{node.name}_"), self._constant, self.heads * self.head_dim
        axis, end = constant([2]), b.node("Reshape", b.node("Cast", total, to=TensorProto.INT64), constant([1]))
        query, new = b.node("Split", qkv, constant([width, 2 * width]), outputs=2, axis=2)
        nothing = b.node("Slice", query, constant([0]), constant([0]), constant([1]))
        new = b.node("QuantizeLinear", b.node("Mul", new, per_step), constant(1, np.float32), constant(0, np.int8))
        new = b.node("Reshape", new, constant([0, 0, 2 * self.heads, self.head_dim]))
        parts = b.node("Split", b.node("Transpose", new, perm=(0, 2, 1, 3)), outputs=2, axis=1, num_outputs=2)

        # A row's new tokens follow its earlier ones; in a first prompt the shorter rows end before `total`.
        behind = b.node("Add", b.node("Cast", last, to=TensorProto.INT64), constant([1]))
        start = b.node("Max", b.node("Sub", behind, self._columns), constant([0]))
        outputs, widened = [], []
        for past, part, scale in zip((past_key, past_value), parts, (key_scale, value_scale), strict=True):
            outputs.append(b.node("TensorScatter", past, part, start, axis=2))
            seen = b.node("Slice", outputs[-1], constant([0]), end, axis)
            # All positions are one block: of DequantizeLinear's forms, that one runs on all threads.
            scales = b.node("Expand", scale, self._per_row)
            widened.append(b.node("DequantizeLinear", seen, scales, axis=2, block_size=_ANY_LENGTH))
        sink = self.shared.constant(np.full(self.heads, _NO_SHARE), np.float32, "no_share")
        inputs = [query, nothing, nothing, *widened, last, total]
        # Nobody reads the second and third output; ONNX Runtime 1.28 to 1.30 end with a fault where they are left out.
        context, _, _ = b.node(
            "GroupQueryAttention", *inputs, *[""] * (_SINK - len(inputs)), sink,
            outputs=3, domain=MICROSOFT, num_heads=self.heads, kv_num_heads=self.heads,
        )  # fmt: skip
        return b.nodes, [context, *outputs]

    def _constant(self, value: Any, dtype: Any = np.int64) -> str:
        return self.shared.constant(value, dtype)


def _copy(node: Any) -> Any:
    copy = type(node)()
    copy.CopyFrom(node)
    return copy


def _branch(name: str, nodes: list[Any], outputs: list[str]) -> Any:
    """A branch whose outputs are the context in float32 and the caches in int8."""
    types = (TensorProto.FLOAT, TensorProto.INT8, TensorProto.INT8)
    values = [helper.make_tensor_value_info(*pair, None) for pair in zip(outputs, types, strict=True)]
    return helper.make_graph(nodes, name, [], values)
