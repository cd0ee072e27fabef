"""Which graph of a bundle prefills the prompts of a graph that decodes: another one only where the certificate allows.

The rule that keeps a response independent of cache and load: the positions of a prompt are always written by the
prefill graph, and generated positions by the graph that decodes (docs/decisions/prefill-graph.md).
"""

from __future__ import annotations

from serving.backends.devices import parse_device
from serving.bundle import Bundle
from serving.bundle.certificate import VERIFIED, prefill_graph_status
from serving.errors import InputError

AUTO, SAME = "auto", "same"


def find_prefill_graph(bundle: Bundle, graph_name: str, wanted: str = AUTO, device: str = "cpu") -> str | None:
    """The graph that prefills for `graph_name` on `device`; None where `graph_name` does so itself.

    `wanted` is "same", "auto" for the graph that the certificate names as verified, or that graph's name. Raises
    InputError for a graph that the bundle does not have or that the certificate does not prove for `graph_name`.
    """
    if wanted in (SAME, graph_name):
        return None
    on_cpu = parse_device(device)[0] == "cpu"
    proven = prefill_graph_status(bundle, graph_name) if on_cpu else None
    if wanted == AUTO:
        return proven[0] if proven is not None and proven[1] == VERIFIED else None
    bundle.graph(wanted)
    if not on_cpu:
        raise InputError(f"--prefill-graph {wanted}: prefill graphs run on the processor only, not on {device}")
    if proven is None or proven[0] != wanted:
        others = f"; it proves {proven[0]!r}" if proven is not None else ""
        raise InputError(
            f"{bundle.folder}: the certificate does not prove {wanted!r} as the prefill graph of {graph_name!r}"
            f"{others}; ask for 'same', or build the bundle again with both graphs"
        )
    return wanted


def check_cache_layouts(bundle: Bundle, graph_name: str, prefill_graph: str) -> None:
    """Raise InputError unless both graphs are optimized ones whose KV caches have one type and one shape."""
    geometry, layouts = bundle.manifest.model, []
    for name in (graph_name, prefill_graph):
        graph = bundle.graph(name)
        past = [(key, spec.dtype) for key, spec in graph.inputs.items() if key.startswith("past_key_values.")]
        layouts.append((graph.runtime, graph.cache, graph.cache_head_dim(geometry), past))
    if layouts[0] != layouts[1] or layouts[0][1] != "shared-buffer":
        raise InputError(
            f"{bundle.folder}: {prefill_graph!r} cannot prefill for {graph_name!r}: their KV caches are not of one kind"
        )
