"""Healthy streams next to hostile clients: python -m benchmarks.serving.attacks BUNDLE --graph ort/int8 --minutes 20.

Calm phases and attacked phases take turns on one server, with the same streaming load in both. The attackers are a
process of their own, at a fixed rate. Their own work takes processor time from the server too; a control phase, in
which they send as many small requests that are answered 404, tells this part from what the attacks cost.
"""

from __future__ import annotations

import gzip
import http.client
import json
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from benchmarks.common.hardware import environment
from benchmarks.common.standalone import run
from benchmarks.serving.server import end_load, serving, start_load

PHASES = ("calm", "control", "attacked")
_SECONDS = 20.0
"""Length of a phase."""
_SETTLE = 60.0
"""Seconds after the end until memory is compared."""


def _bodies() -> dict[str, tuple[str, bytes]]:
    """Path and packed body of each attack that is one request."""
    many = b"[" + b",".join([b"{}"] * 160_000) + b"]"
    stops = ["ab" * 511 + str(number) for number in range(16)]
    fields: dict[str, dict[str, Any]] = {
        "all biases": {"prompt": "a", "n": 8, "logit_bias": {str(token): 0.0 for token in range(50_000)}},
        "long stops": {"prompt": ["a"] * 64, "n": 8, "stop": stops},
        "hostile expression": {"prompt": "a", "guided_regex": "(" * 30 + "a{1,40}" + "){1,40}" * 30},
    }
    bodies = {
        "wrong tensors": ("/v2/models/NAME/infer", b'{"inputs": ' + many + b"}"),
        "wrong tokens": ("/detokenize", b'{"tokens": ' + many + b"}"),
        "wrong prompts": ("/v1/completions", b'{"prompt": ' + many + b"}"),
        "over the value limit": ("/v1/completions", b'{"prompt": [' + b"1," * 1_000_000 + b"1]}"),
        "long text": ("/tokenize", json.dumps({"prompt": "a\u0301 \ud7a3" * 30_000}).encode()),
        "no JSON": ("/v1/completions", b'{"prompt": "' + b"\xff" * 100_000),
    }
    for name, each in fields.items():
        bodies[name] = ("/v1/completions", json.dumps({"max_tokens": 1, **each}).encode())
    # Packed here, once: the attackers' own work takes processor time from the server.
    return {name: (path, gzip.compress(body)) for name, (path, body) in bodies.items()}


def _post(address: tuple[str, int], path: str, body: bytes) -> str:
    """Post the packed `body` and return the status, or how it failed."""
    connection = http.client.HTTPConnection(*address, timeout=30)
    try:
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        answer.read()
        return str(answer.status)
    except OSError as error:
        return type(error).__name__
    finally:
        connection.close()


def _leave(address: tuple[str, int], head: bytes) -> str:
    """Send `head` and leave."""
    with socket.create_connection(address, 30) as connection:
        connection.sendall(head)
    return "left"


def attack(url: str, model: str, seconds: float, rate: float, kind: str, seed: int) -> dict[str, Any]:
    """Send `rate` requests a second for `seconds`: attacks, or harmless ones where `kind` is "control"."""
    parts = urlsplit(url)
    address = (parts.hostname or "127.0.0.1", parts.port or 80)
    text = json.dumps({"prompt": "a " * 100_000}).encode()
    gone = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    attacks: dict[str, Callable[[], str]] = {
        name: lambda path=path, body=body: _post(address, path.replace("NAME", model), body)  # type: ignore[misc]
        for name, (path, body) in _bodies().items()
    }
    attacks["gone after a long text"] = lambda: _leave(address, gone % len(text) + text)
    attacks["unfinished body"] = lambda: _leave(address, gone % 4_000_000 + b'{"prompt": "' + b"a" * 50_000)
    if kind == "control":
        attacks = {"unknown path": lambda: _post(address, "/nothing", gzip.compress(b"{}"))}
    draw, outcomes, threads = random.Random(seed), Counter[str](), []
    ends = time.monotonic() + seconds

    def one(name: str) -> None:
        outcomes[f"{name}: {attacks[name]()}"] += 1

    while time.monotonic() < ends:
        thread = threading.Thread(target=one, args=(draw.choice(list(attacks)),), daemon=True)
        thread.start()
        threads.append(thread)
        time.sleep(1 / rate)
    for thread in threads:
        thread.join(60)
    return {"outcomes": dict(outcomes), "hung": sum(thread.is_alive() for thread in threads)}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--graph", default="ort/int8", show_default=True, help="Graph that is served.")
@click.option("--minutes", default=20.0, show_default=True, help="Length of all phases together.")
@click.option("--clients", default=4, show_default=True, help="Healthy streaming clients.")
@click.option("--rate", default=2.0, show_default=True, help="Attacks per second in an attacked phase.")
@click.option("--attack", "attacked", nargs=5, hidden=True, default=None)
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the record as JSON.")
def main(
    bundle: Path,
    graph: str,
    minutes: float,
    clients: int,
    rate: float,
    attacked: tuple[str, ...] | None,
    output: Path | None,
) -> None:
    """Measure healthy streams of the folder BUNDLE next to attackers."""
    if attacked:
        url, model, seconds, kind, seed = attacked
        click.echo(json.dumps(attack(url, model, float(seconds), rate, kind, int(seed))))
        return
    from serving.bundle import open_bundle

    model = open_bundle(bundle, check="sizes").manifest.name
    record: dict[str, Any] = {"environment": environment(), "graph": graph, "clients": clients, "rate": rate}
    rounds: list[dict[str, Any]] = []
    sizes = ["--clients", str(clients), "--prompt-tokens", "64", "--new-tokens", "96", "--seconds", str(_SECONDS)]
    with serving(bundle, graph) as server:
        end_load(start_load(server.url, [*sizes, "--seconds", "5"]))
        record["resident_bytes_before"] = server.resident_bytes()
        for number in range(max(1, round(minutes * 60 / (_SECONDS * len(PHASES))))):
            for phase in PHASES:
                healthy = start_load(server.url, [*sizes, "--seed", str(number)])
                found: dict[str, Any] = {}
                if phase != "calm":
                    command = [sys.executable, "-m", "benchmarks.serving.attacks", str(bundle), "--rate", str(rate)]
                    command += ["--attack", server.url, model, str(_SECONDS), phase, str(number)]
                    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                rounds.append({"phase": phase, "healthy": json.loads(end_load(healthy)), **found})
                click.echo(f"{phase}: {rounds[-1]['healthy']['inter_token_s']} {found.get('outcomes', '')}", err=True)
        time.sleep(_SETTLE)
        record["resident_bytes_after"] = server.resident_bytes()
    record["rounds"] = rounds
    p99 = {
        phase: statistics.median(each["healthy"]["inter_token_s"]["p99"] for each in rounds if each["phase"] == phase)
        for phase in PHASES
    }
    record["inter_token_p99_s"] = p99
    record["attacked_over_calm"] = p99["attacked"] / p99["calm"]
    record["attacked_over_control"] = p99["attacked"] / p99["control"]
    record["hung"] = sum(each.get("hung", 0) for each in rounds)
    click.echo(json.dumps({key: value for key, value in record.items() if key not in ("rounds", "environment")}))
    if output is not None:
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
