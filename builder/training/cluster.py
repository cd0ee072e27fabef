"""Which processes train one model together: the environment variable TF_CONFIG, as Kubeflow, Ray and people set it."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from builder.recipe import TrainingRecipe
from serving.errors import InputError, TrainingError, cut

_SHAPE = """write it as {"cluster": {"worker": ["HOST:PORT", "HOST:PORT"]}, "task": {"type": "worker", "index": 0}}"""
_JOBS = ("chief", "worker")


@dataclass(frozen=True)
class Cluster:
    """The workers of a training, the chief first.

    Attributes:
        names: of each worker, as TF_CONFIG calls it, such as "worker 1".
        addresses: of each worker, as (host, port).
        rank: of this process, an index into both.
    """

    names: tuple[str, ...]
    addresses: tuple[tuple[str, int], ...]
    rank: int

    @property
    def size(self) -> int:
        return len(self.names)

    def describe(self, rank: int) -> str:
        """Name and address of a worker, for a message."""
        host, port = self.addresses[rank]
        return f"{self.names[rank]} ({host}:{port})"


def read_cluster(environment: Mapping[str, str]) -> Cluster | None:
    """Return the cluster that TF_CONFIG describes; None without one, or with one process in it.

    The chief is the task of type "chief", or worker 0 where no such type is. Raises InputError for anything else than
    the jobs "chief" and "worker", and for addresses or a task that cannot be.
    """
    text = environment.get("TF_CONFIG", "").strip()
    if not text:
        return None
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"TF_CONFIG is not JSON ({cut(str(error))}); {_SHAPE}") from None
    jobs = _section(config, "cluster")
    task = _section(config, "task")
    if not jobs and not task:
        return None
    for job in jobs:
        if job not in _JOBS:
            raise InputError(
                f"TF_CONFIG: cluster has the job {cut(repr(job))}, and training runs on a chief and workers alone; "
                "leave it out"
            )
    tasks = [(job, index, address) for job in _JOBS for index, address in enumerate(_addresses(jobs, job))]
    if len(jobs.get("chief", [])) > 1:
        raise InputError("TF_CONFIG: cluster has several chiefs; name one, and the others as workers")
    kind, index = task.get("type"), task.get("index", 0)
    ours = [
        rank for rank, (job, number, _) in enumerate(tasks) if job == kind and type(index) is int and number == index
    ]
    if not ours:
        raise InputError(
            f"TF_CONFIG: task {cut(json.dumps(task))} is not one of the cluster's "
            f"({', '.join(f'{job} {number}' for job, number, _ in tasks[:8]) or 'which has none'}); {_SHAPE}"
        )
    addresses = tuple(address for _, _, address in tasks)
    for address in addresses:
        if addresses.count(address) > 1:
            raise InputError(
                f"TF_CONFIG: cluster names {address[0]}:{address[1]} twice; give each process its own port"
            )
    if len(tasks) == 1:
        return None
    names = tuple(job if job == "chief" else f"{job} {number}" for job, number, _ in tasks)
    return Cluster(names, addresses, ours[0])


def check_batch(recipe: TrainingRecipe, workers: int) -> None:
    """Raise InputError for a batch that `workers` cannot share evenly."""
    rows = recipe.batch_size // recipe.accumulation
    if rows % workers:
        parts = f" in {recipe.accumulation} parts" if recipe.accumulation > 1 else ""
        raise InputError(
            f"recipe key 'training.batch_size' is {recipe.batch_size}{parts}, which {workers} workers cannot share "
            "evenly; change it or the number of workers"
        )


def listen(cluster: Cluster) -> socket.socket:
    """Open this worker's port, on loopback alone if its address is there. Raises TrainingError if it is taken."""
    host, port = cluster.addresses[cluster.rank]
    try:
        if host in ("localhost", "127.0.0.1", "::1"):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return socket.create_server((host, port), family=family)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be opened ({error.strerror})"
        raise TrainingError(
            f"port {port} of {cluster.describe(cluster.rank)} {why}; end the process that has it, or name another in "
            "TF_CONFIG"
        ) from None


def _section(config: Any, name: str) -> dict[str, Any]:
    section = config.get(name, {}) if isinstance(config, dict) else None
    if not isinstance(section, dict):
        raise InputError(f"TF_CONFIG: no object {name!r} in it; {_SHAPE}")
    return section


def _addresses(jobs: dict[str, Any], job: str) -> list[tuple[str, int]]:
    listed = jobs.get(job, [])
    if not isinstance(listed, list):
        raise InputError(f"TF_CONFIG: cluster.{job} is not a list of addresses; {_SHAPE}")
    found = []
    for address in listed:
        host, _, port = str(address).rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if (
            not isinstance(address, str)
            or not host
            or not port.isascii()
            or not port.isdigit()
            or not 0 < int(port[:6]) < 65536
        ):
            raise InputError(f"TF_CONFIG: {cut(repr(address))} in cluster.{job} is not HOST:PORT; {_SHAPE}")
        found.append((host, int(port)))
    return found
