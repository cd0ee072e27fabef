"""Hours of mixed use in minutes of it: does the server keep what it should give back?

Requests of every kind come at random times, at a modest rate, most of them answered, some left and some refused. What
the process holds is sampled meanwhile. Memory is judged by its slope after a warm-up, with an interval: what grows
slower than the bound even at the interval's upper end is flat. File descriptors, threads and slots are counted before
and after, while nobody asks anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.hardware import usable_cores
from benchmarks.common.own_server import OwnServer
from benchmarks.serving.load import address_of

_INTERVAL = 5.0
"""Seconds between two samples; less in a short soak."""
_PATIENCE = 60.0
_FIRST = 40
"""Requests before anything is counted, so that what is made when first needed is there."""
_SEGMENTS = 10
# Student's t at 97.5 % with _SEGMENTS - 2 degrees of freedom.
_T = 2.306
_WARM_UP = 0.25
"""Share of the time that is not judged: buffers, pools and the allocator's arenas find their size."""
_SETTLE = 10.0
"""Seconds at most until nothing is held any more."""
_POOL = usable_cores() + 4
"""Threads that may come later: asyncio's pool for blocking work, which grows as it is needed and ends there."""
SHARES = {"stream": 30, "whole": 20, "several": 10, "prompts": 5, "scored": 5, "gone": 15}
SHARES |= {"too long": 5, "unknown model": 4, "no JSON": 3, "metrics": 3}
"""Kinds of requests, in per cent."""
_LEFT = "left"


@dataclass(frozen=True)
class Slope:
    """Growth in units an hour, with a 95 % interval."""

    an_hour: float
    low: float
    high: float


def slope(seconds: Sequence[float], values: Sequence[float]) -> Slope:
    """The line through `values` at `seconds`, least squares over the means of ten equal spans of time.

    Means, since neighbouring samples of a process's memory are alike and would make the interval too narrow.
    """
    timestamps, heights = np.asarray(seconds, np.float64) / 3600, np.asarray(values, np.float64)
    if len(timestamps) < 2 * _SEGMENTS:
        raise ValueError(f"a slope takes at least {2 * _SEGMENTS} samples, not {len(timestamps)}")
    x, y = (np.array([part.mean() for part in np.array_split(each, _SEGMENTS)]) for each in (timestamps, heights))
    centred = x - x.mean()
    steepness = float(centred @ y / (centred @ centred))
    residuals = y - y.mean() - steepness * centred
    error = float(np.sqrt(residuals @ residuals / (_SEGMENTS - 2) / (centred @ centred)))
    return Slope(steepness, steepness - _T * error, steepness + _T * error)


@dataclass(frozen=True)
class Call:
    """One request: its kind's name, what it asks, the status that is right, and when its client leaves, if it does.

    `length` is that which the head states, where the body has another; `packed` says that the body is gzip's.
    """

    kind: str
    path: str
    body: bytes | None
    status: int = 200
    leave_after: float | None = None
    length: int | None = None
    packed: bool = False


def draw_call(draw: random.Random, model: str, context: int) -> Call:
    """A random request to a server whose model has `context` positions: seven in ten are to be answered whole."""
    kind = draw.choices(list(SHARES), list(SHARES.values()))[0]
    prompt = [draw.randrange(256) for _ in range(draw.randint(1, context // 2))]
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": draw.randint(1, context // 2)}
    body |= {"ignore_eos": True, "temperature": draw.choice([0, 0.8]), "seed": draw.randrange(1000)}
    status, leave_after = 200, None
    match kind:
        case "stream":
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        case "several":
            body |= {"n": draw.randint(2, 4), "stream": draw.random() < 0.5}
        case "prompts":
            body |= {"prompt": [prompt, prompt[: len(prompt) // 2 + 1]], "logprobs": 2}
        case "scored":
            body |= {"prompt": prompt[:16], "echo": True, "logprobs": 1}
        case "gone":
            body |= {"stream": draw.random() < 0.5, "max_tokens": context // 2}
            leave_after = draw.random() * 0.1
        case "too long":
            body, status = body | {"max_tokens": context}, 400
        case "unknown model":
            body, status = body | {"model": "nobody"}, 404
        case "no JSON":
            return Call(kind, "/v1/completions", b'{"prompt": ', 400)
        case "metrics":
            return Call(kind, "/metrics", None)
    return Call(kind, "/v1/completions", json.dumps(body).encode(), status, leave_after)


async def ask(address: tuple[str, int], call: Call) -> str:
    """Make `call` on a connection of its own: "as it should be", "left", or what was wrong."""
    body = call.body or b""
    head = b"%s %s HTTP/1.1\r\nHost: a\r\n" % (b"GET" if call.body is None else b"POST", call.path.encode())
    head += b"Content-Encoding: gzip\r\n" if call.packed else b""
    head += b"Connection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (
        len(body) if call.length is None else call.length
    )
    try:
        async with asyncio.timeout(_PATIENCE):
            reader, writer = await asyncio.open_connection(*address)
            try:
                writer.write(head + body)
                if call.leave_after is not None:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(reader.read(), call.leave_after)
                    return _LEFT
                answer = await reader.read()
            finally:
                writer.close()
    except TimeoutError:
        return "hung"
    except OSError as error:
        return type(error).__name__
    status = answer.split(b" ", 2)[1].decode() if answer.startswith(b"HTTP/1.1 ") else "no status"
    if status != str(call.status):
        return f"status {status}"
    streamed = b"text/event-stream" in answer.split(b"\r\n\r\n", 1)[0]
    if streamed and b"data: [DONE]" not in answer:
        return "broken off"
    # At an event's beginning, since "error" alone is a text like any other.
    return "error event" if streamed and b'data: {"error"' in answer else "as it should be"


@dataclass
class Sample:
    """What the server's process held at one time; `slots` are those in use."""

    seconds: float
    resident_bytes: int
    descriptors: int
    threads: int
    slots: float


def sample(server: OwnServer, began: float) -> Sample:
    """One sample; asking for the metrics is a request of its own."""
    process = Path(f"/proc/{server.process.pid}")
    return Sample(
        time.monotonic() - began,
        server.resident_bytes(),
        len(list((process / "fd").iterdir())),
        len(list((process / "task").iterdir())),
        server.metric("num_requests_running"),
    )


async def _use(
    server: OwnServer, model: str, context: int, minutes: float, rate: float, outcomes: Counter[str]
) -> list[Sample]:
    address, draw = address_of(server.url), random.Random(0)
    tasks: set[asyncio.Task[None]] = set()
    samples: list[Sample] = []

    async def one(call: Call) -> None:
        outcome = await ask(address, call)
        outcomes[f"{call.kind}: {outcome}"] += 1

    async def watch() -> None:
        while True:
            samples.append(await asyncio.to_thread(sample, server, began))
            await asyncio.sleep(min(_INTERVAL, minutes))

    began = time.monotonic()
    watching = asyncio.create_task(watch())
    while time.monotonic() < began + minutes * 60:
        task = asyncio.create_task(one(draw_call(draw, model, context)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        await asyncio.sleep(draw.expovariate(rate))
    await asyncio.gather(*tasks)
    watching.cancel()
    return samples


def soak(
    server: OwnServer, model: str, context: int, minutes: float, rate: float, bound_mib_an_hour: float
) -> dict[str, Any]:
    """Use `server` for `minutes` at `rate` requests a second; "faults" names what is not as it should be."""
    outcomes: Counter[str] = Counter()
    asyncio.run(_use(server, model, context, _FIRST / rate / 60, rate, Counter()))
    before = _idle(server)
    samples = asyncio.run(_use(server, model, context, minutes, rate, outcomes))
    after = _idle(server)
    judged = [each for each in samples if each.seconds >= _WARM_UP * minutes * 60]
    mib = [each.resident_bytes / 2**20 for each in judged]
    growth = slope([each.seconds for each in judged], mib)
    faults = [f"{count} x {name}" for name, count in outcomes.items() if not name.endswith(("as it should be", _LEFT))]
    if growth.high > bound_mib_an_hour:
        faults.append(f"memory may grow by {growth.high:.1f} MiB an hour, more than {bound_mib_an_hour:g}")
    if after.slots:
        faults.append(f"{after.slots:g} slots are still in use")
    faults += [
        f"{getattr(after, name)} {name} where there were {getattr(before, name)}"
        for name, more in (("descriptors", 0), ("threads", _POOL))
        if getattr(after, name) > getattr(before, name) + more
    ]
    return {
        "minutes": minutes,
        "requests_per_second": rate,
        "outcomes": dict(sorted(outcomes.items())),
        "bound_mib_an_hour": bound_mib_an_hour,
        "resident_mib_an_hour": asdict(growth),
        "judged_samples": len(judged),
        "idle_before": asdict(before),
        "idle_after": asdict(after),
        "samples": [asdict(each) for each in samples],
        "faults": faults,
    }


def _idle(server: OwnServer) -> Sample:
    """What is held once nobody asks anything: connections are closed shortly after their answers."""
    began = time.monotonic()
    held = sample(server, began)
    while time.monotonic() < began + _SETTLE:
        time.sleep(0.5)
        now = sample(server, began)
        if not now.slots and now.descriptors >= held.descriptors and held.seconds > 1:
            break
        held = now
    return held
