"""What a build tells experiment trackers, and what it does when one of them fails.

A tracker's client may hang, print, wait at exit or crash, so each runs in a process of its own (`tracker_process`).
The build only puts lines into a bounded queue. Whatever happens to the process, the build prints one line and
continues; only its end waits, for `tracking.timeout` seconds at most.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import builder
from builder.recipe import Recipe

FOLDER = "tracking"
"""Folder of a run in which each tracker's process keeps what it has sent, and its log."""
_QUEUED = 10_000
# Seconds in which a tracker may close its run after Ctrl-C.
_INTERRUPTED = 5.0
# Neither tool may report its use to its makers on its own account, nor try for minutes to reach a lost server.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
}

Message = dict[str, Any]


class Tracking:
    """The trackers of one run; without any, and before `start`, every method does nothing.

    Args:
        recipe: the run's recipe.
        folder: the run's folder.
        say: prints one line.
    """

    def __init__(self, recipe: Recipe, folder: Path, say: Callable[[str], None]) -> None:
        self._recipe, self._folder, self._say = recipe, folder / FOLDER, say
        self._trackers: list[_Tracker] = []
        self._tools = [tool for tool in dict.fromkeys(recipe.tracking.tools) if _installed(tool)]
        for tool in dict.fromkeys(recipe.tracking.tools):
            if tool not in self._tools:
                say(
                    f"tracking: {tool} is not installed (pip install 'gpt2-bundle[{tool}]'); the build continues "
                    "without it"
                )

    def start(self, key: str) -> None:
        """Start the recipe's trackers for the run `key`: an earlier run of the same key is continued."""
        for tool in self._tools:
            self._folder.mkdir(parents=True, exist_ok=True)
            start = {
                "tool": tool,
                "key": key,
                "state": str(_state(self._folder, tool)),
                "name": self._recipe.name,
                "project": self._recipe.tracking.project,
                "parameters": parameters(self._recipe),
            }
            try:
                self._trackers.append(_Tracker(tool, self._folder / f"{tool}.log", {"start": start}))
            except OSError as error:
                self._say(f"tracking: {tool} does not start ({error.strerror}); the build continues without it")

    def log(self, records: Iterable[Mapping[str, float]]) -> None:
        """Send lines of metrics.jsonl; figures of steps that a tracker has already are not sent again."""
        self._send({"metrics": list(records)})

    def publish(self, folder: Path, figures: Mapping[str, Any]) -> None:
        """Send the figures of a published bundle, and the bundle as the recipe says (`tracking.bundle`)."""
        self._send({"figures": numbers(figures)})
        self._send({"bundle": {"folder": str(folder.resolve()), "mode": self._recipe.tracking.bundle}})

    def addresses(self, key: str) -> dict[str, str]:
        """Where each tracker keeps the run `key`, by tool; a tool that never had it is left out."""
        found = {}
        for tool in self._recipe.tracking.tools:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                state = json.loads(_state(self._folder, tool).read_text(encoding="utf-8"))
                if state["key"] == key:
                    found[tool] = str(state["address"])
        return found

    def close(self, status: str) -> None:
        """Finish each run as "finished", "failed" or "killed", and wait for all together for a bounded time."""
        allowed = self._recipe.tracking.timeout
        deadline = time.monotonic() + (min(allowed, _INTERRUPTED) if status == "killed" else allowed)
        try:
            self._send({"finish": status})
            for tracker in self._trackers:
                tracker.wait(deadline)
        finally:
            for tracker in self._trackers:
                tracker.end()
        self._report()

    def _send(self, message: Message) -> None:
        for tracker in self._trackers:
            tracker.send(message)
        self._report()

    def _report(self) -> None:
        for tracker in self._trackers:
            for line in tracker.troubles():
                self._say(f"tracking: {tracker.tool}: {line}; the build continues")


@contextlib.contextmanager
def tracked(recipe: Recipe, folder: Path, say: Callable[[str], None]) -> Iterator[Tracking]:
    """Give the trackers of a recipe and close them as the block ends: finished, failed, or killed by Ctrl-C."""
    tracking = Tracking(recipe, folder, say)
    status = "failed"
    try:
        yield tracking
        status = "finished"
    except KeyboardInterrupt:
        status = "killed"
        raise
    finally:
        tracking.close(status)


class _Tracker:
    """The process of one tracker. Raises OSError if it cannot be started."""

    def __init__(self, tool: str, log: Path, start: Message) -> None:
        self.tool, self._log = tool, log
        root = str(Path(builder.__file__).parents[1])
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
        with log.open("wb") as errors:
            # Not the build's process group: Ctrl-C is for the build, which then finishes the run.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "builder.tracking.tracker_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=_ENVIRONMENT | os.environ | {"PYTHONPATH": path},
                start_new_session=True,
            )
        self._lines: queue.Queue[bytes | None] = queue.Queue(_QUEUED)
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._done = threading.Event()
        self._finishing = self._behind = False
        assert self._process.stdin is not None and self._process.stdout is not None
        for work, pipe in ((self._write, self._process.stdin), (self._read, self._process.stdout)):
            threading.Thread(target=work, args=(pipe,), daemon=True, name=f"tracking {tool}").start()
        self.send(start)

    def send(self, message: Message) -> None:
        """Put a message into the queue; a full queue drops it, which is said once."""
        self._finishing |= "finish" in message
        try:
            self._lines.put_nowait(json.dumps(message).encode() + b"\n")
        except queue.Full:
            if not self._behind:
                self._said.put("takes nothing in, so figures are left out")
            self._behind = True

    def troubles(self) -> Iterator[str]:
        """What went wrong since the last call."""
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._said.get_nowait()

    def wait(self, deadline: float) -> None:
        """Wait until the process has finished its run, or until `deadline` on the monotonic clock."""
        if not self._done.wait(max(0.0, deadline - time.monotonic())):
            self._said.put("did not finish in time (tracking.timeout) and was ended")

    def end(self) -> None:
        """Kill what is left of the process and of what it started."""
        self._done.set()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _write(self, pipe: IO[bytes]) -> None:
        with contextlib.suppress(OSError, ValueError):
            while (line := self._lines.get()) is not None:
                pipe.write(line)
                pipe.flush()

    def _read(self, pipe: IO[bytes]) -> None:
        finished = False
        for line in pipe:
            with contextlib.suppress(ValueError, AttributeError):
                message = json.loads(line)
                finished |= "done" in message
                if "trouble" in message:
                    self._said.put(str(message["trouble"]))
        if not finished and not self._done.is_set():
            self._said.put(f"its process ended ({_last_line(self._log)}); see {self._log}")
        self._done.set()


def parameters(recipe: Recipe) -> dict[str, Any]:
    """The recipe as "section.key": value, without the section on tracking."""
    table = {key: value for key, value in asdict(recipe).items() if key != "tracking"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in _flat(table, ".")}


def numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a nested table as "section/key": value; true is 1."""
    return {name: float(value) for name, value in _flat(figures, "/") if isinstance(value, (int, float))}


def _flat(table: Mapping[str, Any], joint: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}{joint}{name}", inner) for name, inner in _flat(value, joint))
        else:
            yield key, value


def _installed(tool: str) -> bool:
    """Whether a tool is a real package: W&B's folder of files, ./wandb, looks like one without files."""
    try:
        spec = importlib.util.find_spec(tool)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


def _state(folder: Path, tool: str) -> Path:
    return folder / f"{tool}.json"


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        lines = []
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "no message")
