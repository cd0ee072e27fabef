"""Starts `ray_cluster.py`, gives it orders, and ends all that it has started."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PYTHON = os.environ.get("RAY_PYTHON")
SLOTS = 4
SERVE = [f"--max-num-seqs={SLOTS}", "--threads=1", "--request-timeout=60", "--no-access-log"]
ARGS: dict[str, Any] = {"serve": SERVE, "cpus": 1.0, "min_replicas": 2, "max_replicas": 2}


@dataclass
class RayCluster:
    """The process of `ray_cluster.py`."""

    process: subprocess.Popen[str]
    url: str
    bundle: Path
    head: str = ""

    def order(self, *values: Any) -> Any:
        """Give an order and return its answer."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(values) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the cluster ended: {self.process.wait(5)}"
        return json.loads(line)[values[0]]

    def deploy(self, deployments: Any = (), **args: Any) -> str:
        """Deploy the bundle with ARGS and `args`; why it does not run, "" if it does."""
        problem = self.order("deploy", {"bundle": str(self.bundle), **ARGS, **args}, list(deployments))
        assert isinstance(problem, str)
        return problem

    def wait_for(self, wanted: Callable[[list[str]], bool], seconds: float = 60) -> list[str]:
        """The nodes of the running replicas once they are as `wanted`."""
        deadline = time.monotonic() + seconds
        while not wanted(found := self.order("replicas")):
            assert time.monotonic() < deadline, found
            time.sleep(0.2)
        assert isinstance(found, list)
        return found


@contextlib.contextmanager
def started(bundle: Path) -> Iterator[RayCluster]:
    """A cluster of two nodes on this machine, by the Python of RAY_PYTHON, that is all gone after the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Ray's sockets are below it, and the path of a socket has 107 characters at most.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    script = Path(__file__).with_name("ray_cluster.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "RAY_TMPDIR": folder}
    log = (Path(folder) / "driver.log").open("w")
    process = subprocess.Popen(
        [str(PYTHON), str(script), str(port)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
    )  # fmt: skip
    try:
        made = RayCluster(process, f"http://127.0.0.1:{port}", bundle)
        assert process.stdout
        line = process.stdout.readline()
        assert line, (Path(folder) / "driver.log").read_text(encoding="utf-8")[-2000:]
        made.head = json.loads(line)["head"]
        yield made
    finally:
        assert process.stdin
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            process.stdin.close()
            process.wait(30)
        process.kill()
        log.close()
        kill_all_of(folder)
        shutil.rmtree(folder, ignore_errors=True)


def kill_all_of(folder: str) -> None:
    """Kill what is left of the cluster whose files are in `folder`. Ray's processes overwrite their command lines."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                files = [str(file.readlink()) for file in (entry / "fd").iterdir()]
                if any(file.startswith(f"{folder}/") for file in files):
                    os.kill(int(entry.name), signal.SIGKILL)
