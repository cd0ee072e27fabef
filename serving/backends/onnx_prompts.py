"""Attention to prompts on the processor: an optimized graph, changed in memory, so that ONNX Runtime is faster at it.

ONNX Runtime 1.31 goes through the attention of prompts in tiles, unless there is a sink. With one it multiplies whole
matrices, which took half of the time for prompts of 128 tokens, and more for a step. So a graph with a KV cache in
float32 gets a branch: prompts attend with a sink that takes no share, steps as before. Graphs with a KV cache in int8
have such branches in their files (builder/onnx_export/int8_kv_cache.py). Theirs lose two outputs that nothing reads,
and for which the keys and values of all positions are copied. Files stay as they are.
"""

from __future__ import annotations

import struct
from typing import Any

from serving.errors import InputError
from serving.protobuf.onnx_model import BRANCH, FLOAT, INT8, INT64, MESSAGES
from serving.protobuf.tables import read_message

_ATTENTION = "GroupQueryAttention"
_SINK = 11
_NO_SHARE = -1e30


def with_fast_prompts(data: bytes, heads: int, branches: bool, unread: bool) -> bytes:
    """The ONNX model `data`, whose attention has `heads`, with other nodes for prompts; as it is without attention.

    Args:
        data: the model.
        heads: attention heads of each block.
        branches: whether attention over a KV cache in float32 gets branches. Each costs a step some microseconds.
        unread: whether this ONNX Runtime runs attention with one output. 1.28 to 1.30 end with a fault.
    """
    if _ATTENTION.encode() not in data:
        return data
    model = MESSAGES["Model"]()
    try:
        read_message(data, model)
    except InputError:
        return data
    types = {value.type.tensor_type.elem_type for value in model.graph.input if value.name.startswith("past_key_")}
    if types == {FLOAT} and branches:
        _add_branches(model.graph, heads)
    elif types == {INT8} and unread:
        _drop_unread_outputs(model.graph)
    else:
        return data
    changed: bytes = model.SerializeToString()
    return changed


def _add_branches(graph: Any, heads: int) -> None:
    nodes = [
        _node("Shape", ["input_ids"], "prompts_shape"),
        _node("Gather", ["prompts_shape", "prompts_one"], "prompts_columns"),
        _node("Greater", ["prompts_columns", "prompts_one"], "prompts"),
    ]
    for each in graph.node:
        nodes.append(_branched(each) if each.op_type == _ATTENTION else each)
    copies = [MESSAGES["Node"].FromString(each.SerializeToString()) for each in nodes]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(copies)
    graph.initializer.add(name="prompts_one", data_type=INT64, raw_data=struct.pack("<q", 1))
    graph.initializer.add(
        name="prompts_no_share", data_type=FLOAT, dims=[heads], raw_data=struct.pack(f"<{heads}f", *[_NO_SHARE] * heads)
    )


def _node(op_type: str, inputs: list[str], output: str) -> Any:
    return MESSAGES["Node"](op_type=op_type, input=inputs, output=[output], name=output)


def _branched(attention: Any) -> Any:
    """The node `attention` as an If: with a sink for several tokens of a sequence, as it is for one."""
    whole = MESSAGES["Node"](op_type="If", name=attention.name, input=["prompts"], output=list(attention.output))
    for name in ("then_branch", "else_branch"):
        inner = MESSAGES["Node"].FromString(attention.SerializeToString())
        inner.output[:] = [f"{output}_{name}" for output in attention.output]
        if name == "then_branch":
            inner.input.extend([""] * (_SINK - len(inner.input)) + ["prompts_no_share"])
        attribute = whole.attribute.add(name=name, type=BRANCH)
        attribute.g.name = f"{attention.name}_{name}"
        attribute.g.node.add().MergeFrom(inner)
        for output in inner.output:
            attribute.g.output.add(name=output).type.tensor_type.elem_type = FLOAT
    return whole


def _drop_unread_outputs(graph: Any) -> None:
    for node in graph.node:
        for branch in (attribute.g for attribute in node.attribute if node.op_type == "If"):
            kept = {value.name for value in branch.output}
            for inner in branch.node:
                if inner.op_type == _ATTENTION and kept.isdisjoint(inner.output[1:]):
                    del inner.output[1:]
