"""What the Ray Serve application is told, and the checks before anything starts. Imports no Ray."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from serving.bundle.strict_json import read
from serving.errors import InputError, one_line

_MIB = 1 << 20


@dataclass(frozen=True)
class RayOptions:
    """The `args` of the application in a Serve configuration.

    `serve` has options of `gpt2-bundle serve`, such as "--graph=ort/int8"; those about ports are ignored. `cpus`,
    `memory` (bytes) and `gpus` are reserved for each replica. `prefix_characters` of a prompt choose its replica.
    A stream leaves its replica in parts, at most one in `stream_interval` seconds after the first.
    `check_resources` refuses to start where no node could hold a replica; false where a cluster autoscaler adds nodes.
    """

    bundle: str
    serve: tuple[str, ...] = ()
    cpus: float = 2.0
    memory: int = 0
    gpus: float = 0.0
    min_replicas: int = 1
    max_replicas: int = 8
    prefix_characters: int = 256
    stream_interval: float = 0.02
    check_resources: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.min_replicas <= self.max_replicas or not self.max_replicas:
            raise InputError(
                f"min_replicas is {self.min_replicas} and max_replicas {self.max_replicas}; "
                "write 0 <= min_replicas <= max_replicas and 1 <= max_replicas"
            )
        if self.prefix_characters < 1:
            raise InputError(f"prefix_characters is {self.prefix_characters}; write 1 or more")
        if min(self.cpus, self.memory, self.gpus, self.stream_interval) < 0:
            raise InputError("cpus, memory and gpus are amounts, and stream_interval seconds; write 0 or more")

    def need(self) -> dict[str, float]:
        """Amounts that a replica reserves, by Ray's names of resources."""
        amounts = {"CPU": self.cpus, "memory": float(self.memory), "GPU": self.gpus}
        return {name: amount for name, amount in amounts.items() if amount}

    def serve_options(self) -> dict[str, Any]:
        """`serve` as `gpt2-bundle serve` reads it. Raises InputError."""
        from serving.commands.serve import serve

        try:
            context = serve.make_context("serve", [self.bundle, *self.serve])
        except click.UsageError as error:
            raise InputError(f"serve: {error.format_message()}") from None
        return {name: value for name, value in context.params.items() if name != "bundle"}


def read_options(args: Mapping[str, Any]) -> RayOptions:
    """`args` as RayOptions. Raises InputError for an unknown, missing or wrong one."""
    values = {name: float(value) if name in ("cpus", "gpus", "stream_interval") and type(value) is int else value
              for name, value in args.items()}  # fmt: skip
    try:
        return read(RayOptions, values, "args")
    except InputError:
        raise
    except Exception as error:
        raise InputError(one_line(error)) from None


def check_bundle(options: RayOptions) -> int:
    """Memory that a replica needs, in bytes: the reserved one, or an estimate.

    Raises InputError or BundleError for a folder that cannot be served by this version, and InputError for a bundle
    that does not fit the reserved memory.
    """
    from serving.bundle import open_bundle
    from serving.commands.engine_options import engine_loader
    from serving.deploy.endpoints import BODY_BYTES, PROCESS_BYTES
    from serving.entrypoints.version_sources import check_source, find

    folder = Path(options.bundle)
    check_source(folder)
    bundle = open_bundle(find(folder)[0].folder, check="sizes")
    need = engine_loader(options.serve_options()).estimate(bundle) + PROCESS_BYTES + BODY_BYTES
    if options.memory and options.memory < need:
        raise InputError(
            f"the bundle {bundle.manifest.name!r} needs about {math.ceil(need / _MIB)} MiB and memory is "
            f"{options.memory // _MIB} MiB; raise it, or serve fewer sequences or a smaller graph"
        )
    return options.memory or need


def check_nodes(need: Mapping[str, float], nodes: Iterable[Mapping[str, float]]) -> None:
    """Raise InputError unless one of `nodes`, amounts by resource, could hold a replica that takes `need`."""
    amounts = list(nodes)
    if any(all(node.get(name, 0) >= amount for name, amount in need.items()) for node in amounts):
        return
    most = {name: max((node.get(name, 0) for node in amounts), default=0) for name in need}
    raise InputError(
        f"a replica takes {_said(need)}, and no node of the Ray cluster has that (at most {_said(most)}); add a larger "
        "node, lower cpus, memory or gpus, or set check_resources to false where the cluster adds nodes by itself"
    )


def _said(amounts: Mapping[str, float]) -> str:
    texts = [
        f"{math.ceil(amount / _MIB)} MiB of memory" if name == "memory" else f"{amount:g} {name}"
        for name, amount in amounts.items()
    ]
    return ", ".join(texts) or "nothing"
