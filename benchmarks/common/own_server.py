"""`gpt2-bundle serve` as a process, for measurements."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from benchmarks.common.hardware import process_memory
from serving.errors import ServerError

# Without drafts: on random weights, which repeat themselves, they hold more often than on any text.
PLAIN = ["--speculation", "off"]
SERVE = [sys.executable, "-c", "from serving.cli import main; main()", "serve"]
_ADDRESS = re.compile(r"^serving .* at (http://\S+)")
_GRPC = re.compile(r"gRPC at (\S+) port (\d+)")
# Seconds to load and warm, and to end what runs.
_START, _STOP = 120.0, 30.0
_METRIC = "gpt2_bundle_"


class OwnServer:
    """A running server on free ports of this machine, with one graph of a bundle; ends with its `with` block.

    Attributes:
        url, grpc: its addresses; `grpc` is HOST:PORT, empty without `--grpc-port`.
        process: its process.

    Raises ServerError, with its last words, if it does not get ready.
    """

    def __init__(self, bundle: Path, graph: str, *options: str) -> None:
        command = [*SERVE, str(bundle), "--graph", graph, "--port", "0", "--no-access-log", *PLAIN, *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.url = self.grpc = ""
        output = self.process.stdout
        assert output is not None
        timer = threading.Timer(_START, self.process.kill)
        timer.start()
        last = "it said nothing"
        try:
            # Its gRPC address comes before its URL.
            while not self.url and (line := output.readline().strip()):
                last = line
                if found := _GRPC.search(line):
                    self.grpc = f"{found[1]}:{found[2]}"
                if found := _ADDRESS.match(line):
                    self.url = found[1]
        finally:
            timer.cancel()
        if not self.url:
            self.stop()
            raise ServerError(f"the server ended before it was ready: {last}", "UNAVAILABLE")
        # So that the pipe does not fill up.
        threading.Thread(target=_read_on, args=(output,), daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End it, by SIGKILL if it does not end by SIGTERM."""
        self.process.terminate()
        try:
            self.process.wait(_STOP)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{_METRIC}{name}{{"))

    def resident_bytes(self) -> int:
        """Its resident memory now."""
        return process_memory(self.process.pid)["VmRSS"]


def _read_on(output: IO[str]) -> None:
    for line in output:
        sys.stderr.write(line)
