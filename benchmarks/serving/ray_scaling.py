"""Throughput of 1, 2 and 4 Ray Serve replicas on this machine: python -m benchmarks.serving.ray_scaling BUNDLE.

It runs in an environment with the extra `ray` (`.venv-ray/bin/python`). The same load goes to the plain server, whose
steps give the simulation its times, and to a local Ray cluster with each number of replicas. The processor time of
Ray's proxy and of the ingress, divided by requests and tokens, is what a request costs on its way. All processes share
this machine's cores, with the load generator: above the number of cores, more replicas show no more tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click

from benchmarks.common.hardware import environment
from benchmarks.common.standalone import run
from benchmarks.serving.server import load, serving

PORT = 8123
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """Processor time of a process until now."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def processes_called(title: str) -> list[int]:
    """The processes of this machine that have `title`: Ray names the process of a proxy nowhere else."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
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


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--graph", default="ort/int8", show_default=True, help="Graph that is served.")
@click.option("--replicas", default="1,2,4", show_default=True, help="Numbers of replicas.")
@click.option("--clients", default=16, show_default=True, help="Streaming clients of each replica.")
@click.option("--slots", default=16, show_default=True, help="Sequences that a replica decodes at once.")
@click.option("--seconds", default=20.0, show_default=True, help="Length of each round.")
@click.option("--prompt-tokens", default=64, show_default=True, help="Length of each prompt.")
@click.option("--new-tokens", default=96, show_default=True, help="New tokens of each request.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the record as JSON.")
def main(
    bundle: Path,
    graph: str,
    replicas: str,
    clients: int,
    slots: int,
    seconds: float,
    prompt_tokens: int,
    new_tokens: int,
    output: Path | None,
) -> None:
    """Measure BUNDLE on the plain server and on Ray Serve, for `benchmarks.serving.ray_simulation`."""
    options = [f"--graph={graph}", f"--max-num-seqs={slots}", "--threads=1", "--no-access-log"]

    def asked(many: int, prompt: int = prompt_tokens, new: int = new_tokens) -> list[str]:
        texts = {"clients": many, "seconds": seconds, "prompt-tokens": prompt, "new-tokens": new}
        return [f"--{name}={value}" for name, value in texts.items()]

    with serving(bundle, graph, *options[1:]) as server:
        load(server.url, ["--clients=2", "--seconds=1", "--new-tokens=8"])
        one, full = load(server.url, asked(1)), load(server.url, asked(slots))
        long = load(server.url, asked(1, prompt=4 * prompt_tokens, new=2))
        short = load(server.url, asked(1, prompt=prompt_tokens, new=2))
    points, costs = [], []
    with ray_cluster():
        for count in map(int, replicas.split(",")):
            processes = deploy(bundle.resolve(), options, count)
            url = f"http://127.0.0.1:{PORT}"
            load(url, ["--clients=4", "--seconds=1", "--new-tokens=8"])
            for new in (new_tokens, 4):  # Few tokens tell what a request costs from what a token costs.
                way = [*processes["Proxy"], *processes["Ingress"]]
                before = sum(map(cpu_seconds, way))
                found = load(url, asked(clients * count, new=new))
                spent = sum(map(cpu_seconds, way)) - before
                costs.append((sum(found["outcomes"].values()), found["tokens"], spent))
                points.append({"replicas": count, "clients": clients * count, "prompt_tokens": prompt_tokens,
                               "new_tokens": new, "way_cpu_seconds": spent, **found})  # fmt: skip
                click.echo(f"{count} replicas, {new} new tokens: {found['tokens_per_second']:.0f} tokens/s, "
                           f"{dict(found['outcomes'])}")  # fmt: skip
    per_request, per_token = split_costs(costs)
    steps = [found["inter_token_s"]["p50"] for found in (one, full)]
    prefill = (long["time_to_first_token_s"]["p50"] - short["time_to_first_token_s"]["p50"]) / (3 * prompt_tokens)
    per_sequence = max(0.0, (1 / full["tokens_per_second"] * slots - steps[0]) / (slots - 1))
    machine = {
        "step": max(0.0, steps[0] - per_sequence),
        "step_per_sequence": per_sequence,
        "prefill_per_token": max(0.0, prefill),
        "ingress_per_request": per_request,
        "ingress_per_token": per_token,
        "slots": slots,
        "cores": os.cpu_count(),
    }
    plain = {"one_client": one, "full": full}
    record = {"environment": environment(), "graph": graph, "machine": machine, "plain": plain, "points": points}
    if output is None:
        click.echo(json.dumps(record))
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def split_costs(costs: list[tuple[float, float, float]]) -> tuple[float, float]:
    """Seconds of a request and of a token, by least squares, from (requests, tokens, processor seconds) of rounds."""
    rr, rt, tt = (sum(one[i] * one[j] for one in costs) for i, j in ((0, 0), (0, 1), (1, 1)))
    rs, ts = (sum(one[i] * one[2] for one in costs) for i in (0, 1))
    determinant = rr * tt - rt * rt
    if determinant <= 1e-9 * rr * tt:
        return rs / rr, 0.0
    return max(0.0, (rs * tt - ts * rt) / determinant), max(0.0, (ts * rr - rs * rt) / determinant)


if __name__ == "__main__":
    run(main)
