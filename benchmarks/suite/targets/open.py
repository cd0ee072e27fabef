"""A target from what a person wrote for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from benchmarks.common.own_server import OwnServer
from benchmarks.suite.targets.base import StartedTarget, Target
from benchmarks.suite.targets.generate import GenerateTarget, split_model
from benchmarks.suite.targets.in_process import BatchTarget, EngineTarget
from benchmarks.suite.targets.open_inference_grpc import OpenInferenceGrpcTarget
from benchmarks.suite.targets.openai import OpenAITarget
from benchmarks.suite.targets.started_tf_serving import TFServingProcess, find_server
from benchmarks.suite.targets.tf_serving import TFServingTarget, connect
from serving.backends.loader import load_backend
from serving.backends.prefill_graph import AUTO, find_prefill_graph
from serving.bundle import Bundle
from serving.engine.api import Engine
from serving.errors import GPT2BundleError, InputError, ServerError
from serving.support.suggestions import did_you_mean

# What speaks TensorFlow Serving's API: the protocol, and whether whole answers are asked for where there are slots.
TF_SERVING = {
    "tfserving": ("grpc", False),
    "tfserving-rest": ("rest", False),
    "tfserving-predict": ("grpc", True),
    "tfserving-rest-predict": ("rest", True),
}
# Our own server by each protocol: the name for tables.
OWN = {
    "server": "OpenAI's API",
    "server-tfserving": "TensorFlow Serving's gRPC",
    "server-tfserving-rest": "TensorFlow Serving's REST",
    "server-openinference": "the Open Inference Protocol's generate_stream",
    "server-openinference-grpc": "the Open Inference Protocol's gRPC",
}
KINDS = (
    *("engine=GRAPH", *(f"{kind}=GRAPH" for kind in OWN)),
    *("openai=URL", "openinference=URL", "openinference-grpc=HOST:PORT", "triton=URL/MODEL"),
    *("tfserving", "tfserving=HOST:PORT", "tfserving-rest=URL"),
)
SLOTS, SAVEDMODEL = "slots", "savedmodel"
_LABELS = {"grpc": "gRPC", "rest": "REST"}
_QUEUE = 1_000_000


def open_target(bundle: Bundle, text: str, *, batch: int, emulator: bool = False) -> Target:
    """Make the target that `text` names; nothing is loaded yet.

    A graph of the bundle ("ort/fp32") or "savedmodel" runs in this process in static batches of at most `batch`,
    "engine=GRAPH" in this process with `batch` slots, "server=GRAPH" the same in our own server, started for it,
    and "slots" is the SavedModel's continuous batching in this process. "tfserving" starts TensorFlow Serving with the
    bundle's SavedModel; with an address it is one that runs. "+" after a graph names the graph that prefills for it
    ("ort/int4+same"). docs/bench-format.md has all names. Raises InputError for any other name, RuntimeMissingError
    where TensorFlow Serving is to be started and is not here.
    """
    kind, is_address, address = text.partition("=")
    if is_address and not address:
        raise InputError(f"{text!r} names nothing after the '='; there are {', '.join(KINDS)}")
    if kind in TF_SERVING:
        return _tf_serving(bundle, text, address, emulator)
    if is_address and kind == "openai":
        return OpenAITarget(text, address, emulator=emulator, api_key=os.environ.get("OPENAI_API_KEY"))
    if is_address and kind in ("openinference", "triton", "openinference-grpc"):
        place, model = split_model(address)
        if kind == "triton":
            return GenerateTarget(text, "Triton", place, bundle, model=model, emulator=emulator)
        server, named = "Open Inference server", model or bundle.manifest.name
        if kind == "openinference":
            return GenerateTarget(text, server, place, bundle, model=named, emulator=emulator)
        return OpenInferenceGrpcTarget(text, server, place, bundle, model=named, emulator=emulator)
    if is_address and kind in OWN:
        return _own(bundle, text, kind, address, batch)
    return _in_process(bundle, text, batch)


def default_targets(bundle: Bundle, static: bool = False) -> list[str]:
    """Return the names of what the bundle can run, or of its static batches only."""
    graphs = _graphs(bundle)
    has_savedmodel = "savedmodel/prefill" in bundle.manifest.graphs
    if static:
        return graphs + [SAVEDMODEL] * has_savedmodel
    slots = [SLOTS] * ("savedmodel/prefill_slots" in bundle.manifest.graphs)
    server = ["server=ort/fp32"] * ("ort/fp32" in graphs)
    return [*graphs, *[SAVEDMODEL] * has_savedmodel, *slots, *server, *["tfserving"] * has_savedmodel]


def open_defaults(
    bundle: Bundle, names: Sequence[str], *, batch: int, emulators: Sequence[str] = ()
) -> tuple[list[Target], dict[str, str]]:
    """Make the targets that are here, and say why of each that is not."""
    opened: list[Target] = []
    missing: dict[str, str] = {}
    for name in names:
        try:
            opened.append(open_target(bundle, name, batch=batch, emulator=name in emulators))
        except GPT2BundleError as error:
            missing[name] = str(error)
    return opened, missing


def _in_process(bundle: Bundle, text: str, batch: int) -> Target:
    kind, is_address, named = text.partition("=")
    graph, prefill = _split_graph(named if is_address else text)
    graphs, graph_names = bundle.manifest.graphs, _graphs(bundle)
    if is_address and kind == "engine":
        label, precision = "ONNX Runtime in this process, continuous batching", bundle.graph(graph).precision
        label += _prefilled(bundle, graph, prefill)
        return EngineTarget(text, label, precision, lambda: _engine(bundle, graph, prefill, batch))
    has_slots = {"savedmodel/prefill_slots", "savedmodel/decode_slots"} <= set(graphs)
    if text == SLOTS and has_slots:
        return EngineTarget(text, "TensorFlow in this process, the SavedModel's slots", "fp32", lambda: _slots(bundle))
    if text == SAVEDMODEL and "savedmodel/prefill" in graphs:
        label = "TensorFlow in this process"
        return BatchTarget(text, label, "fp32", lambda: load_backend(bundle, "tensorflow"), batch)
    if graph in graph_names and not is_address:
        label, precision = f"ONNX Runtime in this process{_prefilled(bundle, graph, prefill)}", graphs[graph].precision
        return BatchTarget(
            text, label, precision, lambda: load_backend(bundle, "onnx", graph, prefill_graph=prefill), batch
        )
    known = [*graph_names, *([SAVEDMODEL] if "savedmodel/prefill" in graphs else []), *([SLOTS] if has_slots else [])]
    raise InputError(f"{bundle.folder}: no target {text!r}{did_you_mean(text, [*known, *KINDS])}")


def _tf_serving(bundle: Bundle, text: str, address: str, emulator: bool) -> Target:
    how, whole = TF_SERVING[text.partition("=")[0]]
    if address:
        server, model = f"TensorFlow Serving at {address}", bundle.manifest.name
        return TFServingTarget(
            text, server, bundle, lambda: connect(how, address, model), _LABELS[how], whole=whole, emulator=emulator
        )
    if "savedmodel/prefill" not in bundle.manifest.graphs:
        raise InputError(f"{bundle.folder}: the bundle has no SavedModel for {text}; build it again")
    found = find_server()
    process, emulator = TFServingProcess(text, bundle, found, how), emulator or found.emulator

    def start() -> Target:
        place = process.start()
        return TFServingTarget(
            text, found.label, bundle, lambda: process.connect(place), _LABELS[how],
            whole=whole, emulator=emulator, process=process.pid,
        )  # fmt: skip

    return StartedTarget(text, found.label, "fp32", open_server=start, close_server=process.stop, emulator=emulator)


def _own(bundle: Bundle, text: str, kind: str, named: str, batch: int) -> Target:
    graph, prefill = _split_graph(named)
    precision, model, name = bundle.graph(graph).precision, bundle.manifest.name, "gpt2-bundle serve"
    label = f"{name}, by {OWN[kind]}{_prefilled(bundle, graph, prefill)}"
    is_grpc = kind in ("server-tfserving", "server-openinference-grpc")
    # All requests of a schedule may come at once; what it cannot run waits.
    options = ["--max-num-seqs", str(batch), "--queue", str(_QUEUE), *(["--grpc-port", "0"] if is_grpc else [])]
    options += ["--prefill-graph", prefill]
    started: list[OwnServer] = []

    def start() -> Target:
        try:
            server = OwnServer(bundle.folder, graph, *options)
        except ServerError as error:
            raise ServerError(f"{text}: {error}", error.code) from None
        started.append(server)
        about: dict[str, Any] = {"precision": precision, "process": server.process.pid}
        target: Target
        if kind == "server":
            target = OpenAITarget(text, server.url, ids=True, **about)
        elif kind == "server-openinference":
            target = GenerateTarget(text, name, server.url, bundle, model=model, **about)
        elif kind == "server-openinference-grpc":
            target = OpenInferenceGrpcTarget(text, name, server.grpc, bundle, model=model, **about)
        else:
            how, address = ("grpc", server.grpc) if is_grpc else ("rest", server.url)
            target = TFServingTarget(text, name, bundle, lambda: connect(how, address, model), "", whole=True, **about)
        target.label = label
        return target

    def stop() -> None:
        while started:
            started.pop().stop()

    return StartedTarget(text, label, precision, open_server=start, close_server=stop)


def _split_graph(named: str) -> tuple[str, str]:
    """The graph, and the prefill graph that follows a "+"; "auto" without one."""
    graph, plus, prefill = named.partition("+")
    if plus and not prefill:
        raise InputError(f"{named!r} names no prefill graph after the '+'; write {graph}+same, or leave it out")
    return graph, prefill or AUTO


def _prefilled(bundle: Bundle, graph: str, prefill: str) -> str:
    """For a label: which graph prefills, where it is another one."""
    found = find_prefill_graph(bundle, graph, prefill)
    return "" if found is None else f", prefill by {found}"


def _graphs(bundle: Bundle) -> list[str]:
    return [name for name, graph in bundle.manifest.graphs.items() if graph.runtime == "onnx" and graph.cache != "none"]


def _engine(bundle: Bundle, graph: str, prefill: str, slots: int) -> Engine:
    from serving.engine.config import EngineConfig
    from serving.engine.engine import open_engine

    # All requests of a schedule may come at once; what the engine cannot run waits.
    config = EngineConfig(slots=slots, queue_limit=_QUEUE, speculation="off", prefill_graph=prefill)
    return open_engine(bundle, graph, config=config)


def _slots(bundle: Bundle) -> Engine:
    from serving.clients.session_transport import SessionTransport
    from serving.engine.savedmodel_engine import open_slot_engine

    return open_slot_engine(bundle, SessionTransport(bundle), max_waiting=_QUEUE)
