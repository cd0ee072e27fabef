"""Healthy streams next to hostile clients: python -m benchmarks.serving.attacks BUNDLE --graph ort/int8 --minutes 20.

Calm phases and attacked phases take turns on one server, with the same streaming load in both. The attackers are a
process of their own, at a fixed rate. Their own work takes processor time from the server too; a control phase, in
which they send as many small requests that are answered 404, tells this part from what the attacks cost.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import multiprocessing
import random
import statistics
import time
from collections import Counter
from typing import Any

import click

from benchmarks.common.own_server import OwnServer
from benchmarks.common.standalone import measurement, run, say
from benchmarks.serving.load import address_of, end_load, load, start_load
from benchmarks.serving.soak import Call, ask
from serving.bundle import Bundle

PHASES = ("calm", "control", "attacked")
_SECONDS = 20.0
"""Length of a phase."""
_SETTLE = 60.0
"""Seconds after the end until memory is compared."""
_PATIENCE = 60.0


def attacks_on(model: str) -> list[Call]:
    """One call of each attack; their statuses do not matter."""
    many = b"[" + b",".join([b"{}"] * 160_000) + b"]"
    fields: dict[str, dict[str, Any]] = {
        "all biases": {"prompt": "a", "n": 8, "logit_bias": {str(token): 0.0 for token in range(50_000)}},
        "long stops": {"prompt": ["a"] * 64, "n": 8, "stop": ["ab" * 511 + str(number) for number in range(16)]},
        "hostile expression": {"prompt": "a", "guided_regex": "(" * 30 + "a{1,40}" + "){1,40}" * 30},
    }
    bodies = {
        "wrong tensors": (f"/v2/models/{model}/infer", b'{"inputs": ' + many + b"}"),
        "wrong tokens": ("/detokenize", b'{"tokens": ' + many + b"}"),
        "wrong prompts": ("/v1/completions", b'{"prompt": ' + many + b"}"),
        "over the value limit": ("/v1/completions", b'{"prompt": [' + b"1," * 1_000_000 + b"1]}"),
        "long text": ("/tokenize", json.dumps({"prompt": "a\u0301 \ud7a3" * 30_000}).encode()),
        "no JSON": ("/v1/completions", b'{"prompt": "' + b"\xff" * 100_000),
    }
    for name, each in fields.items():
        bodies[name] = ("/v1/completions", json.dumps({"max_tokens": 1, **each}).encode())
    text = json.dumps({"prompt": "a " * 100_000}).encode()
    unfinished = b'{"prompt": "' + b"a" * 50_000
    return [
        # Packed here, once: the attackers' own work takes processor time from the server.
        *(Call(name, path, gzip.compress(body), packed=True) for name, (path, body) in bodies.items()),
        Call("gone after a long text", "/tokenize", text, leave_after=0.01),
        Call("unfinished body", "/tokenize", unfinished, leave_after=0.01, length=4_000_000),
    ]


async def attack(url: str, calls: list[Call], seconds: float, rate: float, seed: int) -> dict[str, Any]:
    """Send `rate` of `calls` a second for `seconds`; how they ended, and how many did not."""
    draw, outcomes = random.Random(seed), Counter[str]()

    async def one(call: Call) -> None:
        outcomes[f"{call.kind}: {await ask(address_of(url), call)}"] += 1

    tasks: set[asyncio.Task[None]] = set()
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        tasks.add(asyncio.create_task(one(draw.choice(calls))))
        await asyncio.sleep(1 / rate)
    _, hung = await asyncio.wait(tasks, timeout=_PATIENCE)
    for task in hung:
        task.cancel()
    return {"outcomes": dict(outcomes), "hung": len(hung)}


def _attackers(url: str, model: str, phase: str, rate: float, seed: int) -> dict[str, Any]:
    harmless = [Call("unknown path", "/nothing", gzip.compress(b"{}"), 404, packed=True)]
    calls = attacks_on(model) if phase == "attacked" else harmless
    return asyncio.run(attack(url, calls, _SECONDS, rate, seed))


@measurement(
    click.option("--minutes", default=20.0, show_default=True, help="Length of all phases together."),
    click.option("--rate", default=2.0, show_default=True, help="Attacks per second in an attacked phase."),
    clients=4,
)
def main(bundle: Bundle, graph: str, clients: int, minutes: float, rate: float) -> dict[str, Any]:
    """Measure healthy streams of the folder BUNDLE next to attackers."""
    rounds: list[dict[str, Any]] = []
    memory = {}
    attackers = multiprocessing.get_context("spawn").Pool(1)
    with OwnServer(bundle.folder, graph) as server, attackers:
        load(server.url, clients=clients, seconds=5)
        memory["resident_bytes_before"] = server.resident_bytes()
        for number in range(max(1, round(minutes * 60 / (_SECONDS * len(PHASES))))):
            for phase in PHASES:
                healthy = start_load(server.url, clients=clients, seconds=_SECONDS, seed=number)
                found: dict[str, Any] = {}
                if phase != "calm":
                    found = attackers.apply(_attackers, (server.url, bundle.manifest.name, phase, rate, number))
                rounds.append({"phase": phase, "healthy": end_load(healthy), **found})
                say(f"{phase}: {rounds[-1]['healthy']['inter_token_s']} {found.get('outcomes', '')}")
        time.sleep(_SETTLE)
        memory["resident_bytes_after"] = server.resident_bytes()
    p99 = {
        phase: statistics.median(each["healthy"]["inter_token_s"]["p99"] for each in rounds if each["phase"] == phase)
        for phase in PHASES
    }
    return {
        **memory,
        "inter_token_p99_s": p99,
        "attacked_over_calm": p99["attacked"] / p99["calm"],
        "attacked_over_control": p99["attacked"] / p99["control"],
        "hung": sum(each.get("hung", 0) for each in rounds),
        "rounds": rounds,
    }


if __name__ == "__main__":
    run(main)
