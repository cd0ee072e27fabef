"""A Ray Serve cluster as a discrete-event simulation: python -m benchmarks.serving.ray_simulation RECORD.

RECORD is what `benchmarks.serving.ray_scaling` measured. The simulation first repeats its points and prints how far it
is off. Then it goes to sizes that no machine here has. It routes by the application's own hash ring.

A replica takes steps, each of a time that is linear in the sequences that it decodes and in the prompt tokens that it
prefills. An ingress is one server that handles requests and tokens in the order in which they come. The network takes
no time, and replicas neither start nor fail.
"""

from __future__ import annotations

import heapq
import itertools
import json
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from benchmarks.common.standalone import OUTPUT, finish, numbers_of
from benchmarks.serving.load import quantiles
from serving.ray.prefix_routing import HashRing, preferred


@dataclass(frozen=True)
class Machine:
    """Times in seconds of a replica's step and of an ingress; `cores` bounds what runs at once (None: no bound)."""

    step: float
    step_per_sequence: float
    prefill_per_token: float
    ingress_per_request: float
    ingress_per_token: float
    slots: int = 16
    chunk: int = 512
    cores: int | None = None


@dataclass(frozen=True)
class Traffic:
    """Requests: `clients` that ask again at once (closed loop), or `rate` a second at random times (open loop).

    Each has `shared` tokens of one of `groups` prefixes (Zipf's law, exponent 1), `own` tokens, and gets `new` tokens.
    """

    requests: int
    shared: int = 0
    own: int = 64
    new: int = 96
    groups: int = 1
    clients: int = 0
    rate: float = 0.0


_MANY = Traffic(requests=1, shared=256, own=64, new=96)
"""What larger clusters are asked, but for the rate."""


@dataclass
class _Request:
    arrived: float
    group: int
    ingress: int
    routed: float = 0.0
    first: float = 0.0
    cached: bool = False


@dataclass
class _Replica:
    name: str
    prefilling: deque[list[Any]] = field(default_factory=deque)
    """[request, prompt tokens left]."""
    ends: list[tuple[int, int, _Request]] = field(default_factory=list)
    """Running sequences as (step of the last token, order, request)."""
    prefixes: OrderedDict[int, None] = field(default_factory=OrderedDict)
    in_flight: int = 0
    steps: int = 0
    busy: bool = False


class Simulation:
    """One run; `by_prefix` routes as the application does, else to the less busy of two."""

    def __init__(
        self,
        machine: Machine,
        traffic: Traffic,
        replicas: int,
        ingresses: int = 1,
        by_prefix: bool = True,
        seed: int = 0,
    ) -> None:
        self._machine, self._traffic, self._by_prefix = machine, traffic, by_prefix
        self._replicas = {name: _Replica(name) for name in (f"replica-{index}" for index in range(replicas))}
        self._ring, self._names = HashRing(self._replicas), list(self._replicas)
        self._free = [0.0] * ingresses
        self._ingress_busy = [0.0] * ingresses
        self._loads = [Counter[str]() for _ in range(ingresses)]
        self._waiting: list[deque[_Request]] = [deque() for _ in range(ingresses)]
        self._limit = machine.slots + max(1, machine.slots // 4)
        self._draw = random.Random(seed)
        self._weights = list(itertools.accumulate(1 / (rank + 1) for rank in range(max(1, traffic.groups))))
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._started, self._running = 0, 0
        self.now = 0.0
        self.done: list[_Request] = []
        self.times: list[float] = []

    def run(self) -> dict[str, Any]:
        """Tokens a second, quantiles in seconds, the share of prefixes found, and how busy the busiest ingress was."""
        traffic = self._traffic
        for _ in range(min(traffic.clients, traffic.requests) or 1):
            self._arrive(0.0)
        while self._events:
            self.now, _, act = heapq.heappop(self._events)
            act(self.now)
        tokens, end = len(self.done) * traffic.new, max(self.now, *self._free)
        return {
            "replicas": len(self._replicas),
            "ingresses": len(self._free),
            "requests": len(self.done),
            "tokens_per_second": tokens / end,
            "time_to_first_token_s": quantiles([each.first - each.arrived for each in self.done]),
            "latency_s": quantiles(self.times),
            "cached_prefixes": sum(each.cached for each in self.done) / len(self.done),
            "busiest_ingress": max(self._ingress_busy) / end,
        }

    def _at(self, moment: float, act: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (moment, next(self._order), act))

    def _arrive(self, now: float) -> None:
        traffic = self._traffic
        if self._started == traffic.requests:
            return
        ingress = self._started % len(self._free)
        self._started += 1
        group = self._draw.choices(range(len(self._weights)), cum_weights=self._weights)[0]
        request = _Request(now, group, ingress)
        self._at(self._through(ingress, now, self._machine.ingress_per_request), lambda at: self._route(request, at))
        if traffic.rate:
            self._at(now + self._draw.expovariate(traffic.rate), self._arrive)

    def _through(self, ingress: int, now: float, work: float) -> float:
        """When the ingress is done with `work` that comes now."""
        self._free[ingress] = max(now, self._free[ingress]) + work
        self._ingress_busy[ingress] += work
        return self._free[ingress]

    def _route(self, request: _Request, now: float) -> None:
        request.routed = now
        for name in self._candidates(request):
            if self._replicas[name].in_flight < self._limit:
                self._send(request, self._replicas[name], now)
                return
        self._waiting[request.ingress].append(request)

    def _candidates(self, request: _Request) -> Iterator[str]:
        loads = self._loads[request.ingress]
        if self._by_prefix:
            spare = max(1, self._machine.slots // 2)
            yield from preferred(self._ring, request.group.to_bytes(4), loads, loads.total(), spare)
        else:
            pair = self._draw.sample(self._names, min(2, len(self._names)))
            yield from sorted(pair, key=lambda name: self._replicas[name].in_flight)
        yield from self._names

    def _send(self, request: _Request, replica: _Replica, now: float) -> None:
        replica.in_flight += 1
        self._loads[request.ingress][replica.name] += 1
        request.cached = self._traffic.shared > 0 and request.group in replica.prefixes
        replica.prefixes[request.group] = None
        replica.prefixes.move_to_end(request.group)
        if len(replica.prefixes) > self._machine.slots:
            replica.prefixes.popitem(last=False)
        prompt = self._traffic.own + (0 if request.cached else self._traffic.shared)
        replica.prefilling.append([request, max(1, prompt)])
        if not replica.busy:
            replica.busy = True
            self._running += 1
            self._begin(replica, now)

    def _begin(self, replica: _Replica, now: float) -> None:
        machine = self._machine
        chunk = 0
        if replica.prefilling and len(replica.ends) < machine.slots:
            chunk = min(machine.chunk, replica.prefilling[0][1])
        seconds = machine.step + machine.step_per_sequence * len(replica.ends) + machine.prefill_per_token * chunk
        if machine.cores is not None:  # Replicas and ingresses share them; so does nothing else.
            seconds *= max(1.0, (self._running + self._load_of_ingress()) / machine.cores)
        self._at(now + seconds, lambda at: self._end(replica, chunk, at))

    def _load_of_ingress(self) -> float:
        return sum(self._ingress_busy) / self.now if self.now else 0.0

    def _end(self, replica: _Replica, chunk: int, now: float) -> None:
        machine, traffic = self._machine, self._traffic
        replica.steps += 1
        if replica.ends:  # Each sequence's token goes through its ingress.
            for ingress, count in Counter(each.ingress for _, _, each in replica.ends).items():
                self._through(ingress, now, count * machine.ingress_per_token)
        while replica.ends and replica.ends[0][0] <= replica.steps:
            self._finish(heapq.heappop(replica.ends)[2], replica, now)
        if chunk:
            first = replica.prefilling[0]
            first[1] -= chunk
            if not first[1]:
                replica.prefilling.popleft()
                request: _Request = first[0]
                request.first = self._through(request.ingress, now, machine.ingress_per_token)
                if traffic.new > 1:
                    heapq.heappush(replica.ends, (replica.steps + traffic.new - 1, next(self._order), request))
                else:
                    self._finish(request, replica, now)
        if replica.ends or replica.prefilling:
            self._begin(replica, now)
        else:
            replica.busy = False
            self._running -= 1

    def _finish(self, request: _Request, replica: _Replica, now: float) -> None:
        replica.in_flight -= 1
        self._loads[request.ingress][replica.name] -= 1
        left = max(now, self._free[request.ingress])
        self.done.append(request)
        self.times.append(left - request.arrived)
        for waiting in self._waiting:
            if waiting:
                self._send(waiting.popleft(), replica, now)
                break
        if self._traffic.clients:
            self._at(left, self._arrive)


def check(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Each measured point next to its simulation."""
    machine, found = Machine(**record["machine"]), []
    for point in record["points"]:
        traffic = Traffic(
            requests=max(200, 20 * point["clients"]), own=point["prompt_tokens"], new=point["new_tokens"],
            groups=10_000, clients=point["clients"],
        )  # fmt: skip
        measured = point["tokens_per_second"]
        simulated = Simulation(machine, traffic, point["replicas"]).run()["tokens_per_second"]
        row = {"replicas": point["replicas"], "clients": point["clients"], "measured": measured}
        found.append(row | {"simulated": simulated, "ratio": simulated / measured})
    return found


def capacity(machine: Machine, traffic: Traffic) -> tuple[float, float]:
    """Requests a second that a replica answers with full slots and no cached prefix, and that an ingress passes on."""
    slots, prompt = machine.slots, traffic.shared + traffic.own
    # While a full batch decodes `new` tokens, as many prompts are prefilled.
    steps = traffic.new * (machine.step + machine.step_per_sequence * slots)
    replica = slots / (steps + slots * machine.prefill_per_token * prompt)
    return replica, 1 / (machine.ingress_per_request + machine.ingress_per_token * traffic.new)


def sweep(
    machine: Machine, sizes: list[int], ingresses: int, share: float, by_prefix: bool, price: float, seed: int = 0
) -> list[dict[str, Any]]:
    """Each size under an open load of `share` of what its replicas can answer; `price` is of a replica's hour."""
    rows = []
    for size in sizes:
        rate = share * size * capacity(machine, _MANY)[0]
        traffic = replace(_MANY, groups=8 * size, rate=rate, requests=min(12_000, max(600, 20 * size)))
        row = Simulation(replace(machine, cores=None), traffic, size, ingresses, by_prefix, seed).run()
        row["requests_per_second"] = rate
        row["price_per_million_tokens"] = price * size / (row["tokens_per_second"] * 3600) * 1e6
        rows.append(row)
    return rows


@click.command()
@click.argument("record", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--replicas", default="10,30,100,300,1000", show_default=True, help="Numbers of replicas.")
@click.option("--ingresses", default="1,8", show_default=True, help="Numbers of ingress processes.")
@click.option("--share", default=0.7, show_default=True, help="Load, as a share of what the replicas can answer.")
@click.option("--price", default=0.10, show_default=True, help="Price of one replica for one hour.")
@click.option("--random-routing", is_flag=True, help="Route to the less busy of two replicas, whatever the prefix.")
@OUTPUT
def main(
    record: Path, replicas: str, ingresses: str, share: float, price: float, random_routing: bool, output: Path | None
) -> None:
    """Repeat the measured points of RECORD, then simulate larger clusters."""
    measured = json.loads(record.read_text(encoding="utf-8"))
    machine, sizes = Machine(**measured["machine"]), numbers_of(replicas)
    checked = check(measured)
    for row in checked:
        click.echo("{replicas} replicas, {clients} clients: {measured:.0f} tokens/s measured, {simulated:.0f} simulated"
                   .format(**row))  # fmt: skip
    one, passed_on = capacity(machine, _MANY)
    click.echo(
        f"one ingress passes on {passed_on:.0f} requests/s, as many as {passed_on / one:.0f} replicas can answer"
    )
    rows = []
    for count in numbers_of(ingresses):
        rows += sweep(machine, sizes, count, share, not random_routing, price)
    for row in rows:
        click.echo(
            f"{row['replicas']:5} replicas, {row['ingresses']} ingresses: {row['tokens_per_second']:8.0f} tokens/s, "
            f"p99 {row['latency_s']['p99']:6.2f} s, first token p99 {row['time_to_first_token_s']['p99']:6.2f} s, "
            f"{row['cached_prefixes']:4.0%} of prefixes cached, ingress {row['busiest_ingress']:4.0%} busy, "
            f"{row['price_per_million_tokens']:.3f} per million tokens"
        )
    if output is not None:
        finish({"machine": asdict(machine), "checked": checked, "rows": rows}, output)


if __name__ == "__main__":
    main()
