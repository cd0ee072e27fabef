"""Load a runtime by name, importing it only now."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from serving.backends.base import Backend
from serving.backends.devices import parse_device
from serving.backends.prefill_graph import AUTO, SAME, find_prefill_graph
from serving.backends.verify_steps import SpeculationMode, check_speculation, speculates
from serving.bundle import Bundle
from serving.errors import InputError, RuntimeMissingError
from serving.support.suggestions import did_you_mean

# Name of the runtime: the module and class that run it, and the extra of this project that installs it.
RUNTIMES = {
    "onnx": ("serving.backends.onnx", "OnnxBackend", "onnx"),
    "tensorflow": ("serving.backends.tensorflow", "TensorFlowBackend", "tensorflow"),
}


def load_backend(
    bundle: Bundle,
    runtime: str,
    graph: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    speculation: SpeculationMode = "off",
    prefill_graph: str = AUTO,
) -> Backend:
    """Load `bundle` in `runtime`, "onnx" or "tensorflow"; `graph` names one of the bundle's ONNX graphs.

    `device`, "cpu", "cuda" or "cuda:N", is where ONNX Runtime runs it, with `threads` threads; TensorFlow finds both by
    itself. Without `graph` or `threads`, the runtime's own default is taken. `speculation` (see `speculates`) and
    `prefill_graph` (see `find_prefill_graph`) are for ONNX Runtime.

    Raises InputError for an unknown runtime, device or graph and for a graph of the other runtime, RuntimeMissingError
    with the command that installs it if the runtime is not there.
    """
    if runtime not in RUNTIMES:
        raise InputError(f"no runtime {runtime!r}{did_you_mean(runtime, RUNTIMES)}")
    module_name, class_name, _ = RUNTIMES[runtime]
    arguments: dict[str, Any] = {}
    if parse_device(device)[0] != "cpu":
        if runtime != "onnx":
            raise InputError(f"{runtime} finds its devices by itself; ask for {device!r} with '--runtime onnx'")
        arguments["device"] = device
    if threads is not None:
        if runtime != "onnx":
            raise InputError(f"{runtime} finds its threads by itself; ask for {threads} with '--runtime onnx'")
        arguments["threads"] = threads
    if graph == "savedmodel":
        raise InputError("the SavedModel is not an ONNX graph; leave out '--graph', and ask for '--runtime tensorflow'")
    if graph is not None:
        other = bundle.graph(graph).runtime
        if other != runtime:
            raise InputError(f"the graph {graph!r} runs in {other}, not in {runtime}; ask for '--runtime {other}'")
        if runtime == "onnx":
            arguments["graph_name"] = graph
    check_speculation(speculation)
    if runtime == "onnx":
        name = graph or "ort/fp32"
        if speculates(bundle, name, speculation):
            arguments["speculation"] = True
        found = find_prefill_graph(bundle, name, prefill_graph, device)
        arguments |= {} if found is None else {"prefill_graph": found}
    elif prefill_graph not in (AUTO, SAME):
        raise InputError(f"{runtime} has no prefill graphs; ask for {prefill_graph!r} with '--runtime onnx'")
    with runtime_errors(runtime):
        backend: Backend = getattr(importlib.import_module(module_name), class_name)(bundle, **arguments)
    return backend


@contextlib.contextmanager
def runtime_errors(runtime: str) -> Iterator[None]:
    """Turn what importing `runtime` raises into a RuntimeMissingError with the command that installs it."""
    extra = RUNTIMES[runtime][2]
    try:
        yield
    except ModuleNotFoundError as error:
        raise RuntimeMissingError(
            f"the runtime {runtime!r} needs the package {error.name!r}, which is not installed here; "
            f"run: pip install 'gpt2-bundle[{extra}]'"
        ) from error
    except ImportError as error:
        raise RuntimeMissingError(
            f"the runtime {runtime!r} is installed but does not load ({error}); "
            f"run: pip install --force-reinstall 'gpt2-bundle[{extra}]'"
        ) from error
