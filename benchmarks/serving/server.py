"""`gpt2-bundle serve` as a process, and the load generator as another, for measurements."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SERVE = [sys.executable, "-c", "from serving.cli import main; main()", "serve"]
_LOAD = [sys.executable, "-m", "benchmarks.serving.load"]
METRIC = "gpt2_bundle_"


class ServerProcess:
    """A running server."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{METRIC}{name}{{"))

    def resident_bytes(self) -> int:
        """Its resident memory now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024


@contextlib.contextmanager
def serving(bundle: Path, graph: str, *options: str) -> Iterator[ServerProcess]:
    """A server on a free port for the block; what it logs goes to this process's standard error."""
    command = [*SERVE, str(bundle), "--graph", graph, "--port", "0", "--no-access-log", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"the server ended with {process.wait()}")
        yield ServerProcess(process, line.split()[-1])
    finally:
        process.kill()
        process.wait()


def load(url: str, options: Sequence[str]) -> dict[str, Any]:
    """The load generator's result."""
    result: dict[str, Any] = json.loads(end_load(start_load(url, options)))
    return result


def start_load(url: str, options: Sequence[str]) -> subprocess.Popen[str]:
    """The load generator under way."""
    return subprocess.Popen([*_LOAD, url, *options], stdout=subprocess.PIPE, text=True)


def end_load(process: subprocess.Popen[str]) -> str:
    """What it printed. Raises SystemExit if it failed."""
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the load generator ended with {process.returncode}")
    return output
