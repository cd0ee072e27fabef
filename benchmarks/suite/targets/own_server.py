"""This project's own server, started for the run and stopped after it, in a process of its own."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable

from benchmarks.suite.load.schedule import Planned
from benchmarks.suite.targets.base import Completion, Target, TargetError
from serving.bundle import Bundle
from serving.errors import ServerError

_ADDRESS = re.compile(r"^serving .* at (http://\S+)")
_GRPC = re.compile(r"gRPC at (\S+) port (\d+)")
# Seconds to load and warm, and to end what runs.
_START, _STOP = 120.0, 30.0

Client = Callable[[str, str, int], Target]
"""Makes the target that speaks to the server, from its URL, its gRPC address and its process id."""


class OwnServerTarget:
    """`gpt2-bundle serve` on free ports of this machine, with one graph of a bundle, asked by the protocol of `client`.

    Args:
        how: the protocol, for the label.
        slots: texts that it runs at once.
        grpc: whether its gRPC port is opened too.
        prefill_graph: as for `--prefill-graph`.
    """

    emulator = False
    starts_in = "own"

    def __init__(
        self,
        name: str,
        bundle: Bundle,
        graph: str,
        precision: str | None,
        slots: int,
        how: str,
        client: Client,
        grpc: bool = False,
        prefill_graph: str = "auto",
    ) -> None:
        self.name, self.label, self.precision = name, f"gpt2-bundle serve, by {how}", precision
        self._command = ["serve", str(bundle.folder), "--graph", graph, "--port", "0"]
        self._command += ["--prefill-graph", prefill_graph]
        self._command += ["--grpc-port", "0"] if grpc else []
        # All requests of a schedule may come at once; what it cannot run waits.
        self._command += ["--max-num-seqs", str(slots), "--queue", "1000000"]
        self._client = client
        self._process: asyncio.subprocess.Process | None = None
        self._served: Target | None = None
        self._drain: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "serving.cli", *self._command, "--no-access-log"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            url, grpc = await asyncio.wait_for(self._addresses(), _START)
        except TimeoutError:
            raise ServerError(f"{self.name}: not ready after {_START:g} s", "UNAVAILABLE") from None
        self._drain = asyncio.create_task(_read_on(self._process))
        self._served = self._client(url, grpc, self._process.pid)
        await self._served.start()

    async def send(self, request: Planned) -> Completion:
        if self._served is None:
            raise TargetError(f"{self.name} is not started")
        return await self._served.send(request)

    async def stop(self) -> None:
        process, served = self._process, self._served
        self._process, self._served = None, None
        if served is not None:
            await served.stop()
        if process is None:
            return
        if process.returncode is None:
            process.terminate()
        if self._drain is None:
            self._drain = asyncio.create_task(_read_on(process))
        try:
            await asyncio.wait_for(process.wait(), _STOP)
        except TimeoutError:
            process.kill()
            await process.wait()
        await self._drain

    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def _addresses(self) -> tuple[str, str]:
        """Read what the server says until it names its URL; its gRPC address comes before. Raises ServerError."""
        assert self._process is not None and self._process.stdout is not None
        last, grpc = "it said nothing", ""
        while line := (await self._process.stdout.readline()).decode("utf-8", "replace").strip():
            if found := _GRPC.search(line):
                grpc = f"{found[1]}:{found[2]}"
            if found := _ADDRESS.match(line):
                return found[1], grpc
            last = line
        raise ServerError(f"{self.name}: the server ended before it was ready: {last}", "UNAVAILABLE")


async def _read_on(process: asyncio.subprocess.Process) -> None:
    """Keep the pipe from filling up."""
    assert process.stdout is not None
    while await process.stdout.readline():
        pass
