"""The load generator's closed loop over an engine, without a server."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

from benchmarks.serving.load import Results
from serving.engine.api import Engine, Event, FinishEvent, GenerationRequest, TokenEvent
from serving.sampling import SamplingParams


def bare(
    engine: Engine, clients: int, seconds: float, prompt_tokens: int, new_tokens: int, seed: int
) -> dict[str, Any]:
    """What the load generator does, without a server: each of `clients` submits again when its text is complete."""
    results, draw = Results(), random.Random(seed)
    params = SamplingParams(max_new_tokens=new_tokens, temperature=0, ignore_eos=True)
    lock, open_clients = threading.Lock(), threading.Semaphore(0)
    ended = [threading.Semaphore(0) for _ in range(clients)]
    began = time.perf_counter()

    def client(number: int) -> None:
        while time.perf_counter() < began + seconds:
            with lock:
                prompt = tuple(draw.randrange(256) for _ in range(prompt_tokens))
            sent, last = time.perf_counter(), 0.0

            def listen(event: Event) -> None:
                nonlocal last
                if isinstance(event, TokenEvent):
                    now = time.perf_counter()
                    if last:
                        results.gaps.append(now - last)
                    else:
                        results.first.append(now - sent)  # noqa: B023
                    last = now
                    results.arrivals.append((now, 1))
                elif isinstance(event, FinishEvent):
                    results.outcomes[event.reason] += 1
                    ended[number].release()

            engine.submit(GenerationRequest(prompt, params, logprobs=0), listen)
            ended[number].acquire()
        open_clients.release()

    for number in range(clients):
        threading.Thread(target=client, args=(number,), daemon=True).start()
    for _ in range(clients):
        open_clients.acquire()
    results.tokens = len(results.arrivals)
    return results.summary(began, seconds)
