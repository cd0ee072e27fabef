"""This project's own server, started for the run and stopped after it, in a process of its own."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

from benchmarks.suite.schedule import Planned
from benchmarks.suite.targets.base import Answer, TargetError
from benchmarks.suite.targets.openai import OpenAITarget
from serving.errors import ServerError

_ADDRESS = re.compile(r"^serving .* at (http://\S+)")
# Seconds to load and warm, and to end what runs.
_START, _STOP = 120.0, 30.0


class OwnServerTarget:
    """`gpt2-bundle serve` on a free port of this machine, with one graph of a bundle, asked by OpenAI's API."""

    stand_in = False
    starts_in = "own"

    def __init__(self, name: str, folder: Path, graph: str, precision: str | None, slots: int) -> None:
        self.name, self.label, self.precision = name, "gpt2-bundle serve, by OpenAI's API", precision
        self._command = ["serve", str(folder), "--graph", graph, "--port", "0", "--slots", str(slots)]
        self._process: asyncio.subprocess.Process | None = None
        self._served: OpenAITarget | None = None
        self._drain: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "serving.cli", *self._command, "--no-access-log"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            address = await asyncio.wait_for(self._address(), _START)
        except TimeoutError:
            raise ServerError(f"{self.name}: not ready after {_START:g} s", "UNAVAILABLE") from None
        self._drain = asyncio.create_task(self._read_on())
        self._served = OpenAITarget(self.name, address, process=self._process.pid)
        await self._served.start()

    async def send(self, request: Planned) -> Answer:
        if self._served is None:
            raise TargetError(f"{self.name} is not started")
        return await self._served.send(request)

    async def stop(self) -> None:
        process, self._process, self._served = self._process, None, None
        if process is None:
            return
        if process.returncode is None:
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _STOP)
        except TimeoutError:
            process.kill()
            await process.wait()
        if self._drain is not None:
            await self._drain

    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def _address(self) -> str:
        """Read what the server says until it names its address. Raises ServerError if it ends before."""
        assert self._process is not None and self._process.stdout is not None
        last = "it said nothing"
        while line := (await self._process.stdout.readline()).decode("utf-8", "replace").strip():
            if found := _ADDRESS.match(line):
                return found[1]
            last = line
        raise ServerError(f"{self.name}: the server ended before it was ready: {last}", "UNAVAILABLE")

    async def _read_on(self) -> None:
        """Keep the pipe from filling up."""
        assert self._process is not None and self._process.stdout is not None
        stream = self._process.stdout
        while await stream.readline():
            pass
