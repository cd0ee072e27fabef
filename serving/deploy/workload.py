"""The container that runs `gpt2-bundle serve` for one bundle: its arguments, resources and times, for every target."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from serving import __version__
from serving.deploy.endpoints import (
    BODY_BYTES,
    CUDA_BYTES,
    FLUSH_SECONDS,
    GRPC,
    HTTP,
    KEYS_VARIABLE,
    PORTS,
    PRE_STOP_SECONDS,
    PROBES,
    PROCESS_BYTES,
)
from serving.errors import InputError

BundleSource = Literal["pvc", "image", "init"]
Device = Literal["cpu", "cuda"]

BUNDLES = "/bundles"
"""Holds the bundle's folder in a container. The root of a volume may hold files of the file system's own."""
USER = 65532
_MIB = 1 << 20
# The slowest storage that a startup probe allows for, in bytes a second.
_READ_RATE = 20_000_000


@dataclass(frozen=True)
class ServeOptions:
    """How a deployment serves; `drain_timeout` is in seconds, `memory_limit` in bytes (None: what is needed)."""

    graph: str
    device: Device = "cpu"
    cpus: int = 2
    max_num_seqs: int = 16
    memory_limit: int | None = None
    drain_timeout: float = 30.0
    replicas: int = 2
    max_replicas: int = 8
    image: str | None = None
    namespace: str | None = None
    bundle_source: BundleSource = "pvc"
    bundle_image: str | None = None
    prometheus_url: str = "http://prometheus-operated.monitoring:9090"


@dataclass(frozen=True)
class Workload:
    """A bundle with the options that it is served by.

    `engine_bytes` is what weights, KV cache and logits take, `bundle_bytes` the size of the folder, `digest` the
    SHA-256 of its manifest. Raises InputError for a memory limit that the bundle does not fit.
    """

    model: str
    options: ServeOptions
    engine_bytes: int
    bundle_bytes: int
    digest: str

    def __post_init__(self) -> None:
        limit = self.options.memory_limit
        if limit is not None and limit < self.needed_bytes:
            raise InputError(
                f"the bundle {self.model!r} needs about {math.ceil(self.needed_bytes / _MIB)} MiB of memory with "
                f"{self.options.max_num_seqs} sequences, and --memory-limit is {limit // _MIB} MiB; raise it, lower "
                "--max-num-seqs, or choose a smaller --graph"
            )

    @property
    def needed_bytes(self) -> int:
        """Memory of the engine, the process and the request bodies in flight."""
        cuda = CUDA_BYTES if self.options.device == "cuda" else 0
        return self.engine_bytes + PROCESS_BYTES + BODY_BYTES + cuda

    @property
    def memory_mib(self) -> int:
        """The memory limit in MiB: the given one, or what is needed, up to the next multiple of 64."""
        limit = self.options.memory_limit
        return limit // _MIB if limit is not None else math.ceil(self.needed_bytes / (64 * _MIB)) * 64

    @property
    def label(self) -> str:
        """The name of Kubernetes objects: the model's name where it is one, else a name like it with a digest."""
        plain = re.sub(r"[^a-z0-9]+", "-", self.model.lower()).strip("-")
        if plain == self.model and plain[0].isalpha() and len(plain) <= 40:
            return plain
        digest = hashlib.sha256(self.model.encode()).hexdigest()[:6]
        return f"{('' if plain[:1].isalpha() else 'm-') + plain[:30]}".strip("-") + f"-{digest}"

    @property
    def image(self) -> str:
        """The server's image."""
        return self.options.image or f"gpt2-bundle-serve:{__version__}-{self.options.device}"

    @property
    def bundle_image(self) -> str:
        """The image that holds the bundle, by default with a tag of its content."""
        return self.options.bundle_image or f"{self.label}-bundle:{self.digest[:12]}"

    @property
    def bundle_gib(self) -> int:
        """Size of a volume for three versions of the bundle, in GiB."""
        return max(1, math.ceil(3 * self.bundle_bytes / (1 << 30)))

    @property
    def grace_seconds(self) -> int:
        """Time that a server has to end: the drain, complete answers on their way, and 5 seconds to exit."""
        return math.ceil(self.options.drain_timeout) + FLUSH_SECONDS + 5

    @property
    def pod_grace_seconds(self) -> int:
        """The same for a pod, which runs its preStop hook within this time."""
        return PRE_STOP_SECONDS + self.grace_seconds

    @property
    def startup_failures(self) -> int:
        """Failures that the startup probe allows: those of the table, and the time to read the bundle."""
        probe = PROBES[0]
        return probe.failures + math.ceil(self.bundle_bytes / _READ_RATE / probe.period)

    @property
    def queue_target(self) -> int:
        """Waiting requests per pod at which another pod starts."""
        return max(1, self.options.max_num_seqs // 4)

    def arguments(self) -> list[str]:
        """The arguments of the image, whose entry point is `gpt2-bundle serve`."""
        options = self.options
        # The server's own check fails in one line where the kernel would end the process.
        budget = self.memory_mib - (self.needed_bytes - self.engine_bytes) // _MIB
        flags = {
            "host": "0.0.0.0",
            "port": HTTP.number,
            "grpc-port": GRPC.number,
            "graph": options.graph,
            "device": options.device,
            "max-num-seqs": options.max_num_seqs,
            "threads": options.cpus,
            "memory-budget": f"{budget}MiB",
            "drain-timeout": f"{options.drain_timeout:g}",
            "log-format": "json",
        }
        return [f"{BUNDLES}/{self.model}", *(f"--{name}={value}" for name, value in flags.items())]

    def container(self, name: str, mounts: list[dict[str, Any]]) -> dict[str, Any]:
        """The container of a pod; `mounts` bring the bundle."""
        resources = {"cpu": str(self.options.cpus), "memory": f"{self.memory_mib}Mi"}
        gpu = {"nvidia.com/gpu": "1"} if self.options.device == "cuda" else {}
        secret = {"secretKeyRef": {"name": f"{self.label}-api-keys", "key": "keys"}}
        return {
            "name": name,
            "image": self.image,
            "args": self.arguments(),
            "ports": [{"name": port.name, "containerPort": port.number, "protocol": "TCP"} for port in PORTS],
            "env": [{"name": KEYS_VARIABLE, "valueFrom": secret}, {"name": "TMPDIR", "value": "/tmp"}],
            **{f"{probe.kind}Probe": self._probe(probe.kind) for probe in PROBES},
            "lifecycle": {"preStop": {"sleep": {"seconds": PRE_STOP_SECONDS}}},
            # As many processors as the engine has threads: a limit below them would stop threads that others wait for.
            "resources": {"requests": resources | gpu, "limits": resources | gpu},
            "securityContext": container_security(),
            "volumeMounts": [*mounts, {"name": "tmp", "mountPath": "/tmp"}],
        }

    def _probe(self, kind: str) -> dict[str, Any]:
        probe = next(each for each in PROBES if each.kind == kind)
        return {
            "httpGet": {"path": probe.path, "port": HTTP.name},
            "periodSeconds": probe.period,
            "timeoutSeconds": probe.timeout,
            "failureThreshold": self.startup_failures if kind == "startup" else probe.failures,
        }


def container_security() -> dict[str, Any]:
    """What the Pod Security Standard "restricted" asks of a container, and a root file system that is read-only."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def pod_security() -> dict[str, Any]:
    """What the Pod Security Standard "restricted" asks of a pod."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
