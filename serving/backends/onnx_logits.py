"""Logits of many tokens of a prompt from an optimised graph, which as exported returns those of each row's last token.

Scoring a prompt needs the logits after each of its tokens. The graph takes the rows of the last tokens by GatherND
after the last attention. Here these nodes get an input that says which rows to take, so a prefill chunk can return all
of its logits, from the weights that are loaded already. Files stay as they are.
"""

from __future__ import annotations

import struct
from typing import Any

from serving.errors import InputError
from serving.protobuf.onnx_model import INT64, MESSAGES
from serving.protobuf.tables import read_message

OFFSETS = "logits_offsets"
"""The new input, [count] int64: how many tokens before a row's last one each row of logits belongs to.

`logits` is then [batch * count, 1, vocab_size]. One offset of 0 gives what the graph gave before.
"""


def with_offsets(data: bytes, width: int) -> bytes:
    """The ONNX model `data`, of hidden states of `width`, with the input OFFSETS; as it is if it has other nodes."""
    model = MESSAGES["Model"]()
    try:
        read_message(data, model)
    except InputError:
        return data
    graph = model.graph
    gathers = [node for node in graph.node if node.op_type == "GatherND"]
    logits = [value for value in graph.output if value.name == "logits"]
    if len(gathers) != 2 or gathers[0].input[1] != gathers[1].input[1] or not logits:
        return data
    nodes: list[Any] = []
    for node in graph.node:
        if node.op_type != "GatherND":
            nodes.append(node)
            continue
        if node == gathers[0]:
            # [batch, 1] becomes [batch, count, 1].
            nodes += [
                _node("Unsqueeze", [node.input[1], "offsets_axis"], "offsets_newest"),
                _node("Unsqueeze", [OFFSETS, "offsets_axis"], "offsets_column"),
                _node("Sub", ["offsets_newest", "offsets_column"], "offsets_places"),
            ]
        (output,) = node.output
        node.input[1], node.output[0] = "offsets_places", f"{output}_by_offset"
        nodes += [node, _node("Reshape", [node.output[0], "offsets_rows"], output)]
    copies = [MESSAGES["Node"].FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(copies)
    graph.initializer.add(name="offsets_axis", data_type=INT64, dims=[1], raw_data=struct.pack("<q", 1))
    graph.initializer.add(name="offsets_rows", data_type=INT64, dims=[2], raw_data=struct.pack("<2q", -1, width))
    offsets = graph.input.add(name=OFFSETS)
    offsets.type.tensor_type.elem_type = INT64
    offsets.type.tensor_type.shape.dim.add(dim_param="logits_count")
    # Another size than the batch: ONNX Runtime takes sizes of one name as equal where it plans its memory.
    if logits[0].type.tensor_type.shape.dim:
        logits[0].type.tensor_type.shape.dim[0].dim_param = "logits_rows"
    changed: bytes = model.SerializeToString()
    return changed


def _node(op_type: str, inputs: list[str], output: str) -> Any:
    return MESSAGES["Node"](op_type=op_type, input=inputs, output=[output], name=output)
