"""Load a runtime by name, importing it only now."""

from __future__ import annotations

import importlib
from typing import Any

from serving.backends.base import Backend
from serving.bundle import Bundle
from serving.clients.tf_serving import Transport
from serving.errors import InputError, RuntimeMissingError
from serving.suggest import did_you_mean

# Name of the runtime: the module and class that run it, and the extra of this project that installs it.
RUNTIMES = {
    "onnx": ("serving.backends.onnx", "OnnxBackend", "onnx"),
    "tensorflow": ("serving.backends.tensorflow", "TensorFlowBackend", "tensorflow"),
}
DEVICES = ("cpu", "cuda")


def load_backend(bundle: Bundle, runtime: str, graph: str | None = None, device: str = "cpu") -> Backend:
    """Load `bundle` in `runtime`, "onnx" or "tensorflow"; `graph` names one of the bundle's ONNX graphs.

    `device`, "cpu" or "cuda", is where ONNX Runtime runs it; TensorFlow finds devices by itself. Without `graph`, the
    runtime's own default is taken. Raises InputError for an unknown runtime, device or graph and for a graph of the
    other runtime, RuntimeMissingError with the command that installs it if the runtime is not there.
    """
    if runtime not in RUNTIMES:
        raise InputError(f"no runtime {runtime!r}{did_you_mean(runtime, RUNTIMES)}")
    module_name, class_name, extra = RUNTIMES[runtime]
    arguments: dict[str, Any] = {}
    if device not in DEVICES:
        raise InputError(f"no device {device!r}{did_you_mean(device, DEVICES)}")
    if device != "cpu":
        if runtime != "onnx":
            raise InputError(f"{runtime} finds its devices by itself; ask for {device!r} with '--runtime onnx'")
        arguments["device"] = device
    if graph is not None:
        other = bundle.graph(graph).runtime
        if other != runtime:
            raise InputError(f"the graph {graph!r} runs in {other}, not in {runtime}; ask for '--runtime {other}'")
        if runtime == "onnx":
            arguments["graph_name"] = graph
    backend: Backend = _construct(runtime, module_name, class_name, extra, bundle, arguments)
    return backend


def load_slot_transport(bundle: Bundle) -> Transport:
    """The SavedModel of `bundle` in TensorFlow in this process, as a server for `open_slot_engine`.

    Raises RuntimeMissingError as `load_backend` does.
    """
    transport: Transport = _construct(
        "tensorflow", "serving.backends.tensorflow_session", "SessionTransport", "tensorflow", bundle, {}
    )
    return transport


def _construct(
    runtime: str, module_name: str, class_name: str, extra: str, bundle: Bundle, arguments: dict[str, Any]
) -> Any:
    try:
        return getattr(importlib.import_module(module_name), class_name)(bundle, **arguments)
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
