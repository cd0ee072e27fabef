"""Slots and concurrent requests of a SavedModel compared with one request of `serving_default`.

python -m benchmarks.experiments.savedmodel_slots BUNDLE

Everything runs in this process through TensorFlow's Session API, on random prompts, greedily, in rounds. The time per
token of `serving_default` is the difference between calls for many tokens and for one; that of `decode_slots` is a
whole call. `highest slot only` has one active slot above free ones. `concurrent` is as many requests of one row, each
on its own thread, as `one request` has rows. `next to others` is a stream while whole answers never stop coming.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import click
import numpy as np

from benchmarks.common.standalone import measurement, numbers_of, run
from benchmarks.suite.targets.tf_serving import greedy_inputs
from serving.bundle import Bundle
from serving.clients.session_transport import SessionTransport
from serving.errors import GPT2BundleError

TOKENS = 32
_CALL_SECONDS = 600.0


@measurement(
    click.option("--rows", default="1,4,8,16", show_default=True, help="Numbers of active slots, and of requests."),
    click.option("--others", default=4, show_default=True, help="Number of whole answers next to a stream."),
    graph=None, prompt_tokens=128, repeats=3,
)  # fmt: skip
def main(bundle: Bundle, rows: str, others: int, prompt_tokens: int, repeats: int) -> dict[str, Any]:
    """Measure milliseconds a token, and tokens a second of concurrent requests; a round before is not counted."""
    model = _Model(SessionTransport(bundle), prompt_tokens)
    record: dict[str, Any] = {"ms_a_token": {}, "tokens_per_second": {}}
    for count in numbers_of(rows):
        ways: dict[str, Callable[[], list[float]]] = {
            "serving_default": partial(model.loop, count),
            "decode_slots, 1 token a call": partial(model.slots, count, 1),
            "decode_slots, 8 tokens a call": partial(model.slots, count, 8),
        }
        if count > 1:
            ways["decode_slots, 1 token a call, highest slot only"] = partial(model.slots, count, 1, highest=True)
        times = _rounds(ways, repeats)
        record["ms_a_token"][str(count)] = {name: statistics.median(some) * 1e3 for name, some in times.items()}
        times = _rounds(
            {"one request": partial(model.whole, count), "concurrent": partial(model.concurrent, count)}, repeats
        )
        rates = {name: count * TOKENS / statistics.median(some) for name, some in times.items()}
        record["tokens_per_second"][str(count)] = rates
    alone, crowded = model.slots(1, 1), model.slots_next_to(others)
    record["stream_ms"] = {
        name: {"median": statistics.median(some) * 1e3, "longest": max(some) * 1e3}
        for name, some in (("alone", alone), (f"next to {others} others", crowded))
    }
    return record


def _rounds(ways: dict[str, Callable[[], list[float]]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            found = way()
            times[name] += found if number else []
    return times


class _Model:
    """The signatures of one SavedModel, timed."""

    def __init__(self, transport: SessionTransport, prompt: int) -> None:
        self._transport, self._prompt = transport, prompt

    def whole(self, rows: int, tokens: int = TOKENS) -> list[float]:
        """Seconds of one request of `rows` rows."""
        return [self._call("serving_default", self._inputs(rows, tokens))[0]]

    def loop(self, rows: int) -> list[float]:
        """Seconds a token of `serving_default`."""
        (first,), (whole,) = self.whole(rows, 1), self.whole(rows, TOKENS + 1)
        return [(whole - first) / TOKENS]

    def concurrent(self, count: int) -> list[float]:
        """Seconds until the last of `count` requests of one row has its answer."""
        inputs = self._inputs(count, TOKENS)
        single = [{name: value[row : row + 1] for name, value in inputs.items()} for row in range(count)]
        start = time.perf_counter()
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(partial(self._call, "serving_default"), single))
        return [time.perf_counter() - start]

    def slots(self, rows: int, steps: int, highest: bool = False) -> list[float]:
        """Seconds a token of each call of `decode_slots` for `steps` tokens."""
        names = np.arange(rows, dtype=np.int64) + time.time_ns()
        _, given = self._call("prefill_slots", {"request_id": names, **self._inputs(rows, TOKENS + 1)})
        if (given["status"] < 0).any():
            raise GPT2BundleError("the SavedModel has fewer slots than --rows asks for; export it with more")
        held = {name: given[name] for name in ("slot", "generation")}
        if highest:
            self._call("release_slots", {name: value[:-1] for name, value in held.items()})
            held = {name: value[-1:] for name, value in held.items()}
        size, seconds = len(held["slot"]), []
        for received in range(1, TOKENS + 1, steps):
            counts = {"received": np.full(size, received, np.int32), "steps": np.full(size, steps, np.int32)}
            seconds.append(self._call("decode_slots", held | counts)[0] / steps)
        self._call("release_slots", held)
        return seconds

    def slots_next_to(self, others: int) -> list[float]:
        """Seconds per token of a stream while this number of whole answers runs."""
        over = threading.Event()

        def answers() -> None:
            while not over.is_set():
                self.whole(1)

        with ThreadPoolExecutor(others) as pool:
            for _ in range(others):
                pool.submit(answers)
            try:
                return self.slots(1, 1)
            finally:
                over.set()

    def _inputs(self, rows: int, tokens: int) -> dict[str, Any]:
        ids = np.random.default_rng(0).integers(0, 250, (rows, self._prompt))
        return greedy_inputs(ids, np.full(rows, self._prompt), tokens)

    def _call(self, signature: str, inputs: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        start = time.perf_counter()
        outputs = self._transport.predict(signature, inputs, _CALL_SECONDS)
        return time.perf_counter() - start, outputs


if __name__ == "__main__":
    run(main)
