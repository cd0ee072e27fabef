"""The certificate of a pair of graphs, one of which prefills and the other decodes, as users run them.

A pair is proven on tokens that decode steps predict after prompts that the prefill graph read, against Keras.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builder.onnx_export.int8_kv_cache import cache_scales
from builder.verification.logit_parity import Reference, batches, greedy_tokens
from builder.verification.quantization_loss import (
    Distribution,
    decoded_distributions,
    greedy_record,
    is_certain,
    problem,
)
from builder.verification.speculation_parity import compare_speculation
from serving.backends.onnx import OnnxBackend
from serving.bundle import Bundle
from serving.bundle.certificate import TOO_FEW, VERIFIED

PREFILL_PRECISION = {"int4": "int8"}
"""By the precision of a graph that decodes: that of the graph that may prefill for it."""


def find_pair(bundle: Bundle, graph_name: str, allowed: set[str]) -> str | None:
    """The graph among `allowed` that may prefill for `graph_name`; None where there is none."""
    graphs = bundle.manifest.graphs
    wanted = PREFILL_PRECISION.get(graphs[graph_name].precision)
    return next((name for name in graphs if name in allowed and graphs[name].precision == wanted), None)


def compare_prefill_graph(
    bundle: Bundle,
    graph_name: str,
    prefill_graph: str,
    reference: Reference,
    golden: dict[str, Any],
    candidates: NDArray[np.int64],
    windows: NDArray[np.int64],
    batch_size: int,
) -> dict[str, Any]:
    """The record of `graph_name` with prompts of `prefill_graph`.

    The first half of each of `windows` [rows, length] is the prompt. The figures are of the tokens that decode steps
    predict in the second half; `same` has those of `graph_name` with its own prompts. `candidates` [prompts,
    new tokens] is the reference's greedy text. Without a "problem", there is a "status".
    """
    record: dict[str, Any] = {"graph": prefill_graph}
    layout = _layout_problem(bundle, graph_name, prefill_graph)
    if layout:
        return record | {"problem": layout}
    prompt_tokens = windows.shape[1] // 2
    if not 1 <= prompt_tokens <= windows.shape[1] - 2:
        return record | {"problem": f"a text of {windows.shape[1]} tokens has no half to read and half to predict"}
    backend = OnnxBackend(bundle, graph_name, prefill_graph=prefill_graph)
    backends = {"mixed": backend, "same": OnnxBackend(bundle, graph_name)}
    found = decoded_distributions(backends, reference, windows, prompt_tokens)
    prompts = golden["prompts"]
    greedy = greedy_record(backend, prompts, candidates, batch_size)
    del greedy["by_prefill"]  # It prefills what was generated, which is never done here.
    same = _table(found["same"])
    record |= {
        "prompt_tokens": prompt_tokens,
        **_table(found["mixed"]),
        **greedy,
        "same": {key: same[key] for key in ("perplexity", "perplexity_relative", "top1_agreement", "kl_divergence")},
        "gate": golden["gates"][graph_name],
    }
    failed = problem(record, record["gate"])
    if failed:
        return record | {"problem": failed}
    rows = batches(len(prompts), batch_size)
    own = np.concatenate([greedy_tokens(backend, prompts[each], candidates.shape[1]) for each in rows])
    speculation = compare_speculation(bundle, graph_name, prompts, own, batch_size, prefill_graph)
    status = VERIFIED if is_certain(record, record["gate"]) else TOO_FEW
    return record | {"status": status, "speculation": speculation or {}}


def _table(distribution: Distribution) -> dict[str, Any]:
    difference = np.concatenate(distribution.loss_differences).sum(dtype=np.float64)
    return distribution.table(math.exp((distribution.loss - float(difference)) / distribution.positions))


def _layout_problem(bundle: Bundle, graph_name: str, prefill_graph: str) -> str | None:
    """Why the KV cache of one graph is not that of the other, or None."""
    types, scales = [], []
    for name in (graph_name, prefill_graph):
        graph = bundle.graph(name)
        types.append({key: spec.dtype for key, spec in graph.inputs.items() if key.startswith("past_key_values.")})
        scales.append(cache_scales(Path(bundle.path(graph.path))))
    if types[0] != types[1]:
        return f"its KV cache is of another type than that of {graph_name}"
    equal = scales[0].keys() == scales[1].keys() and all(
        np.array_equal(value, scales[1][key]) for key, value in scales[0].items()
    )
    return None if equal else f"its KV cache has other scales than that of {graph_name}"
