"""Cold starts: from the start of a process to its first token, each in a new process, the files in the page cache.

All processes share the monotonic clock on Linux.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.suite.figures.record_rows import peak_rss
from benchmarks.suite.load.schedule import Planned
from benchmarks.suite.targets.base import Completion, Target, TargetError
from benchmarks.suite.targets.open import open_target
from serving.bundle import Bundle, open_bundle
from serving.errors import GPT2BundleError

_LONGEST_SECONDS = 300.0


@dataclass(frozen=True)
class ColdStart:
    """Seconds from the start of the process until the target was ready, and until its first token was there."""

    load: float
    first_token: float
    peak_rss_bytes: int | None = None


async def cold_start(target: Target, bundle: Bundle, batch: int, request: Planned) -> ColdStart | None:
    """Start another of `target`, ask it once and end it; None where nobody here can start it. Raises TargetError."""
    if target.starts_in is None:
        return None
    began, rss = time.monotonic(), None
    if target.starts_in == "ours":
        ready, times, rss = await asyncio.to_thread(_in_ours, str(bundle.folder), target.name, batch, request)
    else:
        try:
            ready, answer = await _once(open_target(bundle, target.name, batch=batch), request)
        except GPT2BundleError as error:
            raise TargetError(str(error)) from None
        times = answer.token_times
    if not times:
        raise TargetError("a fresh process gave no token")
    return ColdStart(ready - began, times[0] - began, rss)


async def _once(target: Target, request: Planned) -> tuple[float, Completion]:
    """When the target was ready, and what it answers."""
    try:
        await target.start()
        ready = time.monotonic()
        return ready, await target.send(request)
    finally:
        await target.stop()


_Found = tuple[float, tuple[float, ...], int | None]


def _in_ours(folder: str, name: str, batch: int, request: Planned) -> _Found:
    """The same in a new process of ours, and its peak memory."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, folder, name, batch, request), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(_LONGEST_SECONDS):
            raise TargetError(f"a fresh process gave no answer in {_LONGEST_SECONDS:g} seconds")
        found: _Found | str = ours.recv()
    except EOFError:
        process.join()
        raise TargetError(f"a fresh process ended with {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    if isinstance(found, str):
        raise TargetError(found)
    return found


def _child(answers: Connection, folder: str, name: str, batch: int, request: Planned) -> None:
    # What libraries complain of while they load is no part of a benchmark's output.
    with open(os.devnull, "w", encoding="utf-8") as nothing, contextlib.suppress(OSError):  # noqa: PTH123
        os.dup2(nothing.fileno(), 2)
    try:
        target = open_target(open_bundle(Path(folder), check="sizes"), name, batch=batch)
        ready, answer = asyncio.run(_once(target, request))
    except (GPT2BundleError, TargetError) as error:
        answers.send(f"a fresh process ended: {error}")
        return
    answers.send((ready, answer.token_times, peak_rss(os.getpid())))
