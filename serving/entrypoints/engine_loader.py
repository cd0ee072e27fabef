"""Opens engines of bundles by the runtime that the command line asks for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from serving.backends.autotune import Autotuner
from serving.bundle import Bundle
from serving.clients.session_transport import load_slot_transport
from serving.engine.api import Engine, Observer
from serving.engine.config import EngineConfig, estimate_memory
from serving.engine.slot_backend import cache_bytes
from serving.entrypoints.replicas import Replicas
from serving.errors import InputError
from serving.support.cores import usable_cores

if TYPE_CHECKING:
    from serving.clients.transport import Transport

RUNTIMES = ("onnx", "tensorflow", "tf-serving")
DEFAULT_GRAPH = "ort/fp32"
_SAVED_MODEL = "savedmodel/prefill"
_GRPC = "grpc:"


@dataclass(frozen=True)
class EngineLoader:
    """A `serving.entrypoints.model_manager.Loader`. Raises InputError for settings that do not go together.

    Of `config`, the SavedModel's slots, here or in a remote TensorFlow Serving, take `queue_limit` alone; how many
    slots there are, and of what length, was decided when the model was exported, and `slots` can only use fewer.
    """

    runtime: str = "onnx"
    graph: str | None = None
    devices: tuple[str, ...] = ("cpu",)
    """For ONNX Runtime: the i-th replica is on the i-th of them, and they are taken in turns."""
    replicas: int = 1
    slots: int | None = None
    config: EngineConfig = field(default_factory=EngineConfig)
    tf_serving: str | None = None
    """A TensorFlow Serving's address: a URL for REST, or grpc:HOST:PORT."""
    tuner: Autotuner | None = None
    """Chooses `graph` and the threads of `config` when a bundle is opened."""

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise InputError(f"no runtime {self.runtime!r}; there are {', '.join(RUNTIMES)}")
        if (self.runtime == "tf-serving") != (self.tf_serving is not None):
            raise InputError("the runtime tf-serving and its address belong together; give both")
        if len(self.devices) > self.replicas:
            raise InputError(
                f"{len(self.devices)} devices were named for {self.replicas} of the model; "
                f"give --replicas {len(self.devices)}, or fewer devices"
            )
        if self.runtime == "tf-serving" and self.replicas > 1:
            raise InputError("a remote TensorFlow Serving has one set of slots; leave --replicas out")

    def estimate(self, bundle: Bundle) -> int:
        """Bytes that `open` takes at most, for all replicas; nothing where the model is elsewhere."""
        if self.runtime == "tf-serving":
            return 0
        if self.runtime == "onnx":
            # While it chooses, there is one engine at a time, of at most the largest graph.
            graphs = [self.graph or DEFAULT_GRAPH] if self.tuner is None else self.tuner.options(bundle)["graph"]
            config = self._onnx_config()
            on = [self.devices[index % len(self.devices)] for index in range(self.replicas)]
            return max(sum(estimate_memory(bundle, graph, config, device).total for device in on) for graph in graphs)
        geometry = bundle.manifest.model
        exported = bundle.manifest.provenance.recipe.get("export")
        slots = exported.get("slots", 0) if isinstance(exported, dict) else 0
        cache = cache_bytes(geometry, int(slots), geometry.n_positions, "float32")
        return self.replicas * (2 * bundle.graph_size(_SAVED_MODEL) + cache)

    def open(self, bundle: Bundle, observer: Observer) -> Engine:
        """An engine, or several as one. Raises GPT2BundleError; then nothing is left open."""
        if self.tuner is not None:
            setting = self.tuner.choose(bundle)
            config = replace(self.config, threads=setting.threads)
            return replace(self, graph=setting.graph, config=config, tuner=None).open(bundle, observer)
        engines: list[Engine] = []
        try:
            for index in range(self.replicas):
                engines.append(self._open_one(bundle, observer, self.devices[index % len(self.devices)]))
        except BaseException:
            for engine in engines:
                engine.close()
            raise
        return engines[0] if len(engines) == 1 else Replicas(engines)

    def _open_one(self, bundle: Bundle, observer: Observer, device: str) -> Engine:
        if self.runtime == "onnx":
            from serving.engine.engine import open_engine

            return open_engine(bundle, self.graph, device, self._onnx_config(), observer)
        from serving.engine.savedmodel_engine import open_slot_engine

        transport = self._transport(bundle)
        return open_slot_engine(
            bundle, transport, slots=self.slots, max_waiting=self.config.queue_limit, observer=observer
        )

    def _transport(self, bundle: Bundle) -> Transport:
        address, model = self.tf_serving, bundle.manifest.name
        if address is None:
            return load_slot_transport(bundle)
        if address.startswith(_GRPC):
            from serving.clients.grpc_transport import GrpcTransport

            return GrpcTransport(address.removeprefix(_GRPC), model)
        from serving.clients.rest_transport import RestTransport

        return RestTransport(address, model)

    def _onnx_config(self) -> EngineConfig:
        threads = self.config.threads
        on_processor = sum(self.devices[index % len(self.devices)] == "cpu" for index in range(self.replicas))
        if threads is None and on_processor > 1:
            threads = max(1, usable_cores() // on_processor)
        return replace(self.config, slots=self.slots or self.config.slots, threads=threads)
