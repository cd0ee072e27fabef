"""What is asked of every target, and when: prompts, output lengths and timestamps, drawn from a seed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from serving.errors import InputError
from serving.support.suggestions import did_you_mean

FORMAT = "gpt2-bundle-schedule/1"
ARRIVALS = ("poisson", "gamma", "constant")
# Coefficient of variation of gamma arrivals: burstier than Poisson's 1.
GAMMA_VARIATION = 2.0
# Requests of one rate of a sweep: enough to see a queue grow, few enough to end soon.
_SWEEP_FEWEST, _SWEEP_MOST = 16, 1024
# Seconds from the first request to the last at most: a week.
_LONGEST = 604_800.0


@dataclass(frozen=True)
class Planned:
    """One request: its prompt's token ids, how many tokens to make, and when.

    `at` is seconds after the start, or None where a client sends it as soon as it has the answer to its last.
    """

    index: int
    prompt: tuple[int, ...]
    new_tokens: int
    at: float | None = None


@dataclass(frozen=True)
class Schedule:
    """The requests of one point of a scenario, in order; `settings` say how they were drawn.

    `concurrency` is the number of clients of a closed loop, each with one request under way; None is an open loop.
    """

    scenario: str
    point: str
    settings: dict[str, Any]
    requests: tuple[Planned, ...]
    concurrency: int | None = None

    @property
    def sha256(self) -> str:
        """SHA-256 of `to_lines`, by which records know that targets were asked the same."""
        return hashlib.sha256(self.to_lines().encode()).hexdigest()

    def varied(self, number: int) -> Schedule:
        """The same with another first token in every prompt, out of those that its prompts hold; itself for 0.

        A server that keeps what it has read of a prompt would otherwise not read it again when a schedule is repeated.
        """
        if number == 0:
            return self
        known = sorted({token for request in self.requests for token in request.prompt})
        places = {token: place for place, token in enumerate(known)}
        moved = [known[(places[request.prompt[0]] + number) % len(known)] for request in self.requests]
        pairs = zip(self.requests, moved, strict=True)
        return replace(self, requests=tuple(replace(each, prompt=(first, *each.prompt[1:])) for each, first in pairs))

    def to_lines(self) -> str:
        """JSON Lines: a header, then a request a line."""
        header = {
            "format": FORMAT,
            "scenario": self.scenario,
            "point": self.point,
            "concurrency": self.concurrency,
            "settings": self.settings,
        }
        rows = [header, *(asdict(request) for request in self.requests)]
        return "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)


@dataclass(frozen=True)
class Lengths:
    """How long prompts or outputs are, in tokens: always `low`, or from `low` to `high` by a stated distribution.

    "uniform" draws each length alike; "log-uniform" its logarithm, so that short ones are more frequent.
    """

    low: int
    high: int
    distribution: Literal["fixed", "uniform", "log-uniform"] = "fixed"

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Read `64`, `16-128` (uniform) or `log:16-128`. Raises InputError for anything else."""
        kind, _, numbers = text.rpartition(":")
        low, dash, high = numbers.partition("-")
        if kind not in ("", "log") or not low.isdecimal() or (dash and not high.isdecimal()) or (kind and not dash):
            raise InputError(f"{text!r} is not a length; write 64, 16-128 or log:16-128")
        first, last = int(low), int(high or low)
        if not 1 <= first <= last:
            raise InputError(f"{text!r}: lengths start at 1, and the second is not below the first")
        return cls(first, last, ("log-uniform" if kind else "uniform") if dash else "fixed")

    def draw(self, count: int, random: np.random.Generator) -> list[int]:
        if self.distribution == "log-uniform":
            drawn = np.exp(random.uniform(math.log(self.low), math.log(self.high + 1), count))
            return [int(length) for length in np.clip(drawn, self.low, self.high)]
        return [int(length) for length in random.integers(self.low, self.high, count, endpoint=True)]


class Planner:
    """Draws schedules from one text and one seed; the same arguments give the same schedule, byte for byte.

    Args:
        text: token ids that prompts are cut from, taken as a ring.
        n_positions: the context, which prompt and output fill at most.
        seed: every schedule starts from it.
    """

    def __init__(self, text: Sequence[int], n_positions: int, seed: int = 0) -> None:
        if not text:
            raise InputError("there is no text to cut prompts from")
        self._text, self._n_positions, self._seed = list(text), n_positions, seed

    def single(self, count: int, prompt: Lengths, output: Lengths) -> Schedule:
        """One client that sends the next request when it has the last answer."""
        return self._draw("single", "one at a time", count, prompt, output, concurrency=1)

    def offline(self, count: int, prompt: Lengths, output: Lengths) -> Schedule:
        """All requests at once."""
        return self._draw("offline", f"{count} at once", count, prompt, output, timestamps=[0.0] * count)

    def concurrency(self, clients: int, count: int, prompt: Lengths, output: Lengths) -> Schedule:
        """A number of such clients as of `single`."""
        name = f"{clients} client{'s' if clients > 1 else ''}"
        return self._draw("concurrency", name, count, prompt, output, concurrency=clients)

    def steps(self, batch: int, prompt: int, output: int) -> Schedule:
        """One static batch of prompts, for the graph alone: no scheduler and no client between."""
        lengths = Lengths(prompt, prompt), Lengths(output, output)
        return self._draw("steps", f"batch {batch}", batch, *lengths, timestamps=[0.0] * batch)

    def cold_start(self, prompt: Lengths, output: Lengths) -> Schedule:
        """One request, for a process that has just been started."""
        return self._draw("cold-start", "fresh process", 1, prompt, output, concurrency=1)

    def saturation(
        self,
        prompt: Lengths,
        output: Lengths,
        *,
        start: float,
        factor: float,
        seconds: float,
        rates: int,
        arrivals: str = "poisson",
    ) -> list[Schedule]:
        """A schedule for each rate: `start` requests a second, then `factor` times the last, `rates` of them.

        Each lasts about `seconds`, but has 16 to 1,024 requests. Their gaps, drawn as those of `server`, are scaled so
        that the requests come at exactly that rate.
        """
        if not (start > 0 and 1 < factor <= 100 and 0 < seconds < math.inf and start <= 1e6):
            raise InputError(
                "a sweep starts above 0 and at 1000000 requests a second at most, its factor is above 1 and at most "
                "100, and each rate lasts for some time"
            )
        found = []
        for rate in (start * factor**step for step in range(rates)):
            count = min(max(round(rate * seconds), _SWEEP_FEWEST), _SWEEP_MOST)
            timestamps = np.cumsum(_gaps(arrivals, count, np.random.default_rng((self._seed, 1))))
            timestamps = (timestamps - timestamps[0]) * ((count - 1) / (timestamps[-1] - timestamps[0])) / rate
            more: dict[str, Any] = {"arrivals": arrivals, "rate": rate}
            name = f"{rate:.4g} a second, {arrivals}"
            found.append(self._draw("saturation", name, count, prompt, output, timestamps=timestamps.tolist(), **more))
        return found

    def server(
        self,
        count: int,
        prompt: Lengths,
        output: Lengths,
        *,
        rate: float,
        arrivals: str = "poisson",
    ) -> Schedule:
        """Requests that do not wait for answers: `rate` a second on average.

        Gaps are exponential ("poisson"), of a gamma distribution with a coefficient of variation of 2 ("gamma"), or
        all alike ("constant").
        """
        random = np.random.default_rng((self._seed, 1))
        if arrivals not in ARRIVALS:
            raise InputError(f"no arrivals {arrivals!r}{did_you_mean(arrivals, ARRIVALS)}")
        if not (rate > 0 and math.isfinite(rate)):
            raise InputError(f"the rate is {rate}; it must be above 0 requests a second")
        timestamps = (np.cumsum(_gaps(arrivals, count, random)) / rate).tolist()
        name = f"{rate:g} a second, {arrivals}"
        return self._draw("server", name, count, prompt, output, timestamps=timestamps, arrivals=arrivals, rate=rate)

    def trace(self, recorded: Sequence[float], prompt: Lengths, output: Lengths) -> Schedule:
        """Requests at `recorded` times in seconds, counted from the earliest, that do not wait for answers."""
        first = min(recorded)
        timestamps = [each - first for each in sorted(recorded)]
        return self._draw("server", "trace", len(timestamps), prompt, output, timestamps=timestamps, arrivals="trace")

    def _draw(
        self,
        scenario: str,
        point: str,
        count: int,
        prompt: Lengths,
        output: Lengths,
        *,
        timestamps: Sequence[float] | None = None,
        concurrency: int | None = None,
        **more: Any,
    ) -> Schedule:
        if prompt.high + output.high > self._n_positions:
            raise InputError(
                f"prompts of {prompt.high} and outputs of {output.high} tokens do not fit a context of "
                f"{self._n_positions}; make them shorter"
            )
        if timestamps is not None and timestamps[-1] > _LONGEST:
            raise InputError(
                f"the last of {count} requests would be sent after {timestamps[-1]:.3g} s, and a schedule ends within "
                f"{_LONGEST:.0f} s, a week; ask for a higher rate, or for fewer requests"
            )
        random = np.random.default_rng((self._seed, 0))
        ring = np.array(self._text)
        requests = []
        pairs = zip(prompt.draw(count, random), output.draw(count, random), strict=True)
        for index, (asked, made) in enumerate(pairs):
            start = int(random.integers(len(ring)))
            ids = ring[(start + np.arange(asked)) % len(ring)].tolist()
            requests.append(Planned(index, tuple(ids), made, None if timestamps is None else timestamps[index]))
        settings = {"seed": self._seed, "requests": count, "prompt": asdict(prompt), "output": asdict(output), **more}
        return Schedule(scenario, point, settings, tuple(requests), concurrency)


def _gaps(arrivals: str, count: int, random: np.random.Generator) -> NDArray[np.float64]:
    """Gaps of mean 1 before each of `count` requests."""
    shape = 1 / GAMMA_VARIATION**2
    draws: dict[str, Callable[[], NDArray[np.float64]]] = {
        "poisson": lambda: random.exponential(1.0, count),
        "gamma": lambda: random.gamma(shape, 1 / shape, count),
        "constant": lambda: np.ones(count),
    }
    return draws[arrivals]()
