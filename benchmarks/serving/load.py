"""Load for an OpenAI-compatible server, in a process of its own: python -m benchmarks.serving.load URL --clients 16.

It speaks HTTP/1.1 over plain asyncio streams and reads of each event only what it must, as it shares the machine with
the server that it measures. Closed loop: each client asks again as soon as its answer is complete. With `--rate`,
requests come at random times instead (exponential gaps), whatever is still under way. The result is one JSON object.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import click

_PATIENCE = 120.0
"""Seconds after the end for requests under way; later ones count as hung."""
_IDS = 256
"""Token ids that every vocabulary has."""
_LETTERS = "abcdefghilmnoprstuw"
"""Each is one token after a space, in GPT-2's vocabulary and in the small ones that are trained here."""
_USAGE = re.compile(rb'"completion_tokens": ?(\d+)')
_FULL_LENGTH = re.compile(rb'"finish_reason": ?"length"')


@dataclass
class Results:
    """What came back; times are seconds on one monotonic clock."""

    outcomes: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    arrivals: list[tuple[float, float]] = field(default_factory=list)
    """(timestamp, tokens) of each read."""
    tokens: float = 0
    refused: list[float] = field(default_factory=list)

    def add(self, sent: float, reads: Sequence[tuple[float, int]], tokens: float) -> None:
        """Add the reads of one answer, as (timestamp, events), and its number of tokens."""
        self.first += [timestamp - sent for timestamp, _ in reads[:1]]
        for (before, _), (timestamp, events) in itertools.pairwise(reads):
            self.gaps += [timestamp - before, *[0.0] * (events - 1)]
        scale = tokens / max(1, sum(events for _, events in reads))
        self.arrivals += [(timestamp, events * scale) for timestamp, events in reads]
        self.tokens += tokens if reads else 0

    def summary(self, began: float, seconds: float) -> dict[str, Any]:
        """Rates over the window alone; quantiles over every answer."""
        within = sum(tokens for timestamp, tokens in self.arrivals if timestamp <= began + seconds)
        return {
            "seconds": seconds,
            "tokens_per_second": within / seconds,
            "tokens": self.tokens,
            "outcomes": dict(self.outcomes),
            "time_to_first_token_s": quantiles(self.first),
            "inter_token_s": quantiles(self.gaps),
            "refusal_s": quantiles(self.refused),
        }


def quantiles(values: list[float]) -> dict[str, float] | None:
    """The 50th, 90th and 99th percentile (nearest rank)."""
    ordered = sorted(values)
    if not ordered:
        return None
    return {f"p{share}": ordered[min(len(ordered) - 1, len(ordered) * share // 100)] for share in (50, 90, 99)}


def address_of(url: str) -> tuple[str, int]:
    """Host and port of a server's URL."""
    parts = urlsplit(url)
    return parts.hostname or "127.0.0.1", parts.port or 80


async def ask(address: tuple[str, int], path: str, body: dict[str, Any], results: Results) -> str:
    """One streamed completion on a connection of its own; returns and counts how it ended."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {address[0]}\r\nContent-Type: application/json\r\n"
    sent = time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection(*address)
    except OSError:
        results.outcomes["no connection"] += 1
        return "no connection"
    try:
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        status = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1].decode()
        outcome = await _read(reader, sent, body, results) if status == "200" else status
        if status == "429":
            results.refused.append(time.perf_counter() - sent)
    except (OSError, asyncio.IncompleteReadError, IndexError):
        outcome = "broken off"
    finally:
        writer.close()
    results.outcomes[outcome] += 1
    return outcome


async def _read(reader: asyncio.StreamReader, sent: float, body: dict[str, Any], results: Results) -> str:
    """Read events until the end; "complete" is an answer whose last event is [DONE] and none of whose is an error.

    Whoever was not asked for usage need not send [DONE] either, if the text has its full length.
    """
    tail, whole = b"", bytearray()
    reads: list[tuple[float, int]] = []
    while data := await reader.read(1 << 16):
        now = time.perf_counter()
        whole += data
        # Each event with a choice has one "index"; a read may end inside one.
        events = (tail + data).count(b'"index"')
        tail = data[-6:]
        if events:
            reads.append((now, events))
    # A token inside a character has no event, and an event may have several tokens; the usage at the end has them all.
    usage, full = _USAGE.findall(whole), _FULL_LENGTH.search(whole) is not None
    events = sum(events for _, events in reads)
    results.add(sent, reads, int(usage[-1]) if usage else body["max_tokens"] if full else events)
    if b"data: [DONE]" not in whole and ("stream_options" in body or not full):
        return "broken off"
    # At an event's beginning, since "error" alone is a text like any other.
    return "error event" if b'data: {"error"' in whole else "complete"


def draw_prompt(draw: random.Random, tokens: int, as_text: bool = False) -> list[Any]:
    """As many random tokens: ids, or pieces of text that are one token each."""
    return [f" {draw.choice(_LETTERS)}" if as_text else draw.randrange(_IDS) for _ in range(tokens)]


async def run(
    url: str, body: dict[str, Any], clients: int, seconds: float, rate: float | None, seed: int
) -> dict[str, Any]:
    """Ask for `seconds`, let what is under way end, and summarise."""
    address, path = address_of(url), f"{urlsplit(url).path.rstrip('/')}/v1/completions"
    results, draw = Results(), random.Random(seed)
    prompt: list[Any] = body["prompt"]
    began = time.perf_counter()

    async def one() -> str:
        # A start of its own for each, so that no prompt is found in the cache.
        whole = [*draw_prompt(draw, 4, as_text=isinstance(prompt[0], str)), *prompt[4:]]
        return await ask(
            address, path, {**body, "prompt": "".join(whole) if isinstance(whole[0], str) else whole}, results
        )

    async def client() -> None:
        while time.perf_counter() < began + seconds:
            if await one() != "complete":
                await asyncio.sleep(0.05)

    tasks: set[asyncio.Task[Any]] = set()
    if rate is None:
        tasks |= {asyncio.create_task(client()) for _ in range(clients)}
    else:
        while (now := time.perf_counter()) < began + seconds:
            tasks.add(asyncio.create_task(one()))
            await asyncio.sleep(max(0.0, draw.expovariate(rate) - (time.perf_counter() - now)))
    _, hung = await asyncio.wait(tasks, timeout=seconds + _PATIENCE)
    for task in hung:
        task.cancel()
    results.outcomes["hung"] += len(hung)
    return results.summary(began, seconds)


def load(url: str, **options: Any) -> dict[str, Any]:
    """The load generator's result, from a process of its own; see `start_load`."""
    return end_load(start_load(url, **options))


def start_load(url: str, **options: Any) -> subprocess.Popen[str]:
    """The load generator under way, with these options of its command line, `new_tokens=96` for `--new-tokens 96`."""
    given = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in options.items()]
    command = [sys.executable, "-m", "benchmarks.serving.load", url, *given]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def end_load(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Its result. Raises SystemExit if it failed."""
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the load generator ended with {process.returncode}")
    result: dict[str, Any] = json.loads(output)
    return result


# fmt: off
@click.command()
@click.argument("url")
@click.option("--clients", default=16, show_default=True, type=click.IntRange(1), help="Closed loop: clients at once.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Open loop: requests a second instead.")
@click.option("--seconds", default=20.0, show_default=True)
@click.option("--prompt-tokens", default=64, show_default=True, type=click.IntRange(5))
@click.option("--new-tokens", default=96, show_default=True, type=click.IntRange(2))
@click.option("--model", help="The model's name; left out of the request if not given.")
@click.option("--text", is_flag=True, help="Prompts as text, of words that are one token each, instead of ids.")
@click.option("--plain", is_flag=True, help="Ask for OpenAI's plain fields alone: neither usage nor log-probabilities.")
@click.option("--seed", default=0, show_default=True)
def main(
    url: str, prompt_tokens: int, new_tokens: int, model: str | None, text: bool, plain: bool, seed: int, **how: Any
) -> None:
    """Load the server at URL with streamed, greedy completions of random prompts."""
    body: dict[str, Any] = {
        "prompt": draw_prompt(random.Random(seed), prompt_tokens, text),
        "max_tokens": new_tokens,
        "temperature": 0,
        "stream": True,
    }
    if not plain:
        # Ids make an event of every token, also of those without text, which most of a small tokenizer or of random
        # weights are; log-probabilities wait for the text.
        body |= {"stream_options": {"include_usage": True}, "ignore_eos": True, "logprobs": 0, "return_token_ids": True}
    if model:
        body["model"] = model
    click.echo(json.dumps(asyncio.run(run(url, body, seed=seed, **how))))
# fmt: on


if __name__ == "__main__":
    main()
