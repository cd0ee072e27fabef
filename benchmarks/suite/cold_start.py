"""Cold starts: from the start of a process to its first token, each in a new process, the files in the page cache.

`python -m benchmarks.suite.cold_start` is the process for a target that runs in one of ours. It reads what to open and
what to ask from its input, and writes the timestamps as JSON in its last line. All processes share the monotonic clock
on Linux.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

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


def starts_in(target: Target) -> Literal["ours", "own"] | None:
    """Whether a process of ours runs the target, `start` starts one of its own, or None: it runs already elsewhere."""
    found: Literal["ours", "own"] | None = getattr(target, "starts_in", None)
    return found


async def cold_start(target: Target, bundle: Bundle, batch: int, request: Planned) -> ColdStart | None:
    """Start another of `target`, ask it once and end it; None where nobody here can start it. Raises TargetError."""
    where = starts_in(target)
    if where is None:
        return None
    if where == "ours":
        return await _in_ours(target.name, bundle.folder, batch, request)
    other = open_target(bundle, target.name, batch=batch)
    began = time.monotonic()
    try:
        await other.start()
        ready = time.monotonic()
        answer = await other.send(request)
    except GPT2BundleError as error:
        raise TargetError(str(error)) from None
    finally:
        await other.stop()
    return _measured(began, ready, answer.token_times)


async def _in_ours(name: str, folder: Path, batch: int, request: Planned) -> ColdStart:
    asked = {"bundle": str(folder), "target": name, "batch": batch, "request": asdict(request)}
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.suite.cold_start"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_LONGEST_SECONDS):
            output, complaints = await process.communicate(json.dumps(asked).encode())
    except TimeoutError:
        raise TargetError(f"a fresh process gave no answer in {_LONGEST_SECONDS:g} seconds") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        last = complaints.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise TargetError(f"a fresh process ended with {process.returncode}: {last or 'it said nothing'}")
    found: dict[str, Any] = json.loads(output.decode().strip().rpartition("\n")[2])
    return _measured(began, found["ready"], found["token_times"], found["peak_rss_bytes"])


def _measured(began: float, ready: float, times: tuple[float, ...] | list[float], rss: int | None = None) -> ColdStart:
    if not times:
        raise TargetError("a fresh process gave no token")
    return ColdStart(ready - began, times[0] - began, rss)


def main() -> None:
    """See the module."""
    asked = json.loads(sys.stdin.read())
    bundle = open_bundle(Path(asked["bundle"]), check="sizes")
    target = open_target(bundle, asked["target"], batch=asked["batch"])
    request = Planned(**asked["request"] | {"prompt": tuple(asked["request"]["prompt"])})

    async def work() -> tuple[float, Completion]:
        await target.start()
        ready = time.monotonic()
        try:
            return ready, await target.send(request)
        finally:
            await target.stop()

    try:
        ready, answer = asyncio.run(work())
    except (GPT2BundleError, TargetError) as error:
        sys.exit(str(error))
    print(json.dumps({"ready": ready, "token_times": answer.token_times, "peak_rss_bytes": peak_rss(os.getpid())}))


if __name__ == "__main__":
    main()
