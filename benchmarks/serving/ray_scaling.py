"""Throughput of 1, 2 and 4 Ray Serve replicas on this machine: python -m benchmarks.serving.ray_scaling BUNDLE.

It runs in an environment with the extra `ray` (`.venv-ray/bin/python`). The same load goes to the plain server, whose
steps give the simulation its times, and to a local Ray cluster with each number of replicas. The processor time of
Ray's proxy and of the ingress, divided by requests and tokens, is what a request costs on its way. All processes share
this machine's cores, with the load generator: above the number of cores, more replicas show no more tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.hardware import cpu_seconds
from benchmarks.common.own_server import OwnServer
from benchmarks.common.standalone import measurement, numbers_of, run, say
from benchmarks.serving.load import load
from serving.bundle import Bundle

PORT = 8123


def processes_called(title: str) -> list[int]:
    """The processes of this machine that have `title`: Ray names the process of a proxy nowhere else."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (entry / "cmdline").read_bytes().startswith(title.encode()):
                found.append(int(entry.name))
    return found


@contextmanager
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of this machine, with room for every replica however few its cores are."""
    import ray
    from ray import serve

    ray.init(num_cpus=16, object_store_memory=80 << 20, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def deploy(bundle: Path, options: list[str], replicas: int) -> dict[str, list[int]]:
    """Run the application; the processes of its proxy, ingress and replicas."""
    from ray import serve
    from ray.serve._private.api import serve_start

    from serving.ray.app import build

    args = {"bundle": str(bundle), "serve": options, "cpus": 1.0, "min_replicas": replicas, "max_replicas": replicas}
    serve.run(build(args), name="app", route_prefix="/")
    details = serve_start().get_serve_details()
    found = {name: [each["pid"] for each in deployment["replicas"]]
             for name, deployment in details["applications"]["app"]["deployments"].items()}  # fmt: skip
    return found | {"Proxy": processes_called("ray::ProxyActor")}


@measurement(replicas="1,2,4", clients=16, slots=16, seconds=20.0, prompt_tokens=64, new_tokens=96)
def main(
    bundle: Bundle, graph: str, replicas: str, clients: int, slots: int, seconds: float, prompt_tokens: int,
    new_tokens: int,
) -> dict[str, Any]:  # fmt: skip
    """Measure BUNDLE on the plain server and on Ray Serve, for `benchmarks.serving.ray_simulation`.

    --clients are those of each replica.
    """
    options = [f"--max-num-seqs={slots}", "--threads=1"]
    asked = {"seconds": seconds, "prompt_tokens": prompt_tokens}
    with OwnServer(bundle.folder, graph, *options) as server:
        load(server.url, clients=2, seconds=1, new_tokens=8)
        one, full = (load(server.url, clients=many, new_tokens=new_tokens, **asked) for many in (1, slots))
        long = load(server.url, clients=1, seconds=seconds, prompt_tokens=4 * prompt_tokens, new_tokens=2)
        short = load(server.url, clients=1, new_tokens=2, **asked)
    points, costs = [], []
    with ray_cluster():
        for count in numbers_of(replicas):
            ray_options = [f"--graph={graph}", *options, "--no-access-log"]
            processes = deploy(bundle.folder.resolve(), ray_options, count)
            url = f"http://127.0.0.1:{PORT}"
            load(url, clients=4, seconds=1, new_tokens=8)
            for new in (new_tokens, 4):  # Few tokens tell what a request costs from what a token costs.
                way = [*processes["Proxy"], *processes["Ingress"]]
                before = sum(map(cpu_seconds, way))
                found = load(url, clients=clients * count, new_tokens=new, **asked)
                spent = sum(map(cpu_seconds, way)) - before
                costs.append((sum(found["outcomes"].values()), found["tokens"], spent))
                points.append({"replicas": count, "clients": clients * count, "prompt_tokens": prompt_tokens,
                               "new_tokens": new, "way_cpu_seconds": spent, **found})  # fmt: skip
                rate = f"{found['tokens_per_second']:.0f} tokens/s, {found['outcomes']}"
                say(f"{count} replicas, {new} new tokens: {rate}")
    per_request, per_token = split_costs(costs)
    step = one["inter_token_s"]["p50"]
    prefill = (long["time_to_first_token_s"]["p50"] - short["time_to_first_token_s"]["p50"]) / (3 * prompt_tokens)
    per_sequence = max(0.0, (1 / full["tokens_per_second"] * slots - step) / (slots - 1))
    machine = {
        "step": max(0.0, step - per_sequence),
        "step_per_sequence": per_sequence,
        "prefill_per_token": max(0.0, prefill),
        "ingress_per_request": per_request,
        "ingress_per_token": per_token,
        "slots": slots,
        "cores": os.cpu_count(),
    }
    return {"machine": machine, "plain": {"one_client": one, "full": full}, "points": points}


def split_costs(costs: list[tuple[float, float, float]]) -> tuple[float, float]:
    """Seconds of a request and of a token, by least squares, from (requests, tokens, processor seconds) of rounds.

    Rounds that do not tell them apart put all on the request.
    """
    *terms, spent = np.array(costs, np.float64).T
    found, _, rank, _ = np.linalg.lstsq(np.stack(terms, axis=1), spent, rcond=1e-5)
    if rank < len(terms):
        return float(terms[0] @ spent / (terms[0] @ terms[0])), 0.0
    return max(0.0, float(found[0])), max(0.0, float(found[1]))


if __name__ == "__main__":
    run(main)
