"""A target from what a person wrote for it."""

from __future__ import annotations

import importlib.util
import os
import shutil

from benchmarks.suite.targets.base import Target
from benchmarks.suite.targets.in_process import BatchTarget, EngineTarget
from benchmarks.suite.targets.openai import OpenAITarget
from benchmarks.suite.targets.own_server import OwnServerTarget
from serving.backends.loader import load_backend
from serving.bundle import Bundle
from serving.engine.api import Engine
from serving.errors import InputError, RuntimeMissingError
from serving.suggest import did_you_mean

KINDS = ("openai=URL", "tfserving=HOST:PORT", "engine=GRAPH", "server=GRAPH")
SLOTS = "slots"
SAVEDMODEL = "savedmodel"


def open_target(bundle: Bundle, text: str, *, batch: int, stand_in: bool = False) -> Target:
    """Make the target that `text` names; nothing is loaded yet.

    A graph of the bundle ("ort/fp32") or "savedmodel" runs in this process in static batches of at most `batch`,
    "engine=GRAPH" in this process with `batch` slots, "server=GRAPH" the same behind our own server, started for it;
    "slots" is the SavedModel's continuous batching in this process, "openai=URL" any server of that API,
    "tfserving=HOST:PORT" a TensorFlow Serving (gRPC) that holds this bundle's SavedModel with slots.
    Raises InputError for any other name.
    """
    kind, is_address, address = text.partition("=")
    if is_address and kind == "openai":
        return OpenAITarget(text, address, stand_in=stand_in)
    if is_address and kind == "tfserving":
        return EngineTarget(
            text, "TensorFlow Serving's slots by gRPC", "fp32", lambda: _served(bundle, address), stand_in, None
        )
    if kind == "tfserving":
        raise _no_endpoint()
    graphs = bundle.manifest.graphs
    graph_names = [name for name, graph in graphs.items() if graph.runtime == "onnx" and graph.cache != "none"]
    has_slots = {"savedmodel/prefill_slots", "savedmodel/decode_slots"} <= set(graphs)
    if is_address and kind in ("engine", "server"):
        precision = bundle.graph(address).precision
        if kind == "server":
            return OwnServerTarget(text, bundle.folder, address, precision, batch)
        label = "ONNX Runtime in this process, continuous batching"
        return EngineTarget(text, label, precision, lambda: _engine(bundle, address, batch))
    if text == SLOTS and has_slots:
        return EngineTarget(text, "TensorFlow in this process, the SavedModel's slots", "fp32", lambda: _slots(bundle))
    if text == SAVEDMODEL and "savedmodel/prefill" in graphs:
        label = "TensorFlow in this process"
        return BatchTarget(text, label, "fp32", lambda: load_backend(bundle, "tensorflow"), batch)
    if text in graph_names:
        label, precision = "ONNX Runtime in this process", graphs[text].precision
        return BatchTarget(text, label, precision, lambda: load_backend(bundle, "onnx", text), batch)
    known = [*graph_names, *([SAVEDMODEL] if "savedmodel/prefill" in graphs else []), *([SLOTS] if has_slots else [])]
    raise InputError(f"{bundle.folder}: no target {text!r}{did_you_mean(text, [*known, *KINDS])}")


def default_targets(bundle: Bundle) -> list[str]:
    """The names of everything in the bundle that runs in this process, and our own server where it is installed."""
    names = [
        name for name, graph in bundle.manifest.graphs.items() if graph.runtime == "onnx" and graph.cache != "none"
    ]
    for name, graph in ((SAVEDMODEL, "savedmodel/prefill"), (SLOTS, "savedmodel/prefill_slots")):
        names += [name] if graph in bundle.manifest.graphs else []
    if "ort/fp32" in names and importlib.util.find_spec("uvicorn") is not None:
        names.append("server=ort/fp32")
    return names


def _engine(bundle: Bundle, graph: str, slots: int) -> Engine:
    from serving.engine.config import EngineConfig
    from serving.engine.engine import open_engine

    return open_engine(bundle, graph, config=EngineConfig(slots=slots))


def _slots(bundle: Bundle) -> Engine:
    from serving.backends.tensorflow_session import SessionTransport
    from serving.engine.slot_signatures import open_slot_engine

    return open_slot_engine(bundle, SessionTransport(bundle))


def _served(bundle: Bundle, address: str) -> Engine:
    from serving.clients.tf_serving_grpc import GrpcTransport
    from serving.engine.slot_signatures import open_slot_engine

    return open_slot_engine(bundle, GrpcTransport(address, bundle.manifest.name))


def _no_endpoint() -> RuntimeMissingError:
    binary = shutil.which(os.environ.get("TENSORFLOW_MODEL_SERVER", "tensorflow_model_server"))
    if binary is None:
        return RuntimeMissingError(
            "tensorflow_model_server is not on this machine (PATH, or TENSORFLOW_MODEL_SERVER); "
            "name one that runs elsewhere, as tfserving=HOST:PORT"
        )
    return RuntimeMissingError(f"start {binary} with 'make serve-tfserving' and name it, as tfserving=127.0.0.1:8500")
