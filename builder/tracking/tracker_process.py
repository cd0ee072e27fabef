"""The process of one experiment tracker: reads messages of JSON, a line each, and sends them by the tool's client.

Messages of the build: {"start": {...}}, {"metrics": [...]}, {"figures": {...}}, {"bundle": {...}}, {"finish": STATUS}.
Answers: {"trouble": TEXT} for what did not work, and {"done": true} when the run is finished.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

# Seconds between two attempts to send what a tracker refused.
_AGAIN = 10.0
_QUEUED = 10_000


class TrackedRun(Protocol):
    """A run in a tracker. Each method raises whatever the tool's client raises."""

    address: str
    is_new: bool
    """Whether the tracker has nothing of the run yet."""

    def log(self, records: Sequence[Mapping[str, float]]) -> None:
        """Add figures, each record with its "step"."""

    def figures(self, figures: Mapping[str, float]) -> None:
        """Set the figures of the finished bundle."""

    def bundle(self, folder: Path, mode: str) -> None:
        """Add the bundle's files (mode "copy"), or only its place and its proofs ("reference")."""

    def finish(self, status: str) -> None:
        """Close the run as "finished", "failed" or "killed"."""


def open_run(tool: str, identity: str, name: str, project: str, parameters: Mapping[str, Any]) -> TrackedRun:
    """The run `identity` in a tracker, continued if it is there."""
    if tool == "mlflow":
        from builder.tracking.mlflow_run import MLflowRun

        return MLflowRun(identity, name, project, parameters)
    from builder.tracking.wandb_run import WandbRun

    return WandbRun(identity, name, project, parameters)


class Sender:
    """Sends messages in order. One that the tracker refuses is kept and tried again, before any later one."""

    def __init__(self, open_run: Callable[..., TrackedRun], say: Callable[[dict[str, Any]], None]) -> None:
        self._open_run, self._say = open_run, say
        self._run: TrackedRun | None = None
        self._waiting: list[dict[str, Any]] = []
        self._refused = ""
        self._state: dict[str, Any] = {}
        self._path = Path()

    def take(self, message: dict[str, Any]) -> bool:
        """Handle a message, or none to try again; return whether the run is finished."""
        if message:
            self._waiting.append(message)
        while self._waiting:
            try:
                self._handle(self._waiting[0])
            except Exception as error:
                self._refuse(error)
                break
            self._refused = ""
            self._waiting.pop(0)
        return "finish" in message

    def _refuse(self, error: Exception) -> None:
        text = " ".join(str(error).split()) or type(error).__name__
        finishing = "finish" in self._waiting[-1]
        if not self._refused or finishing:
            self._say({"trouble": f"{text[:300]}" + (" (the run is not complete)" if finishing else "")})
        self._refused = text

    def _handle(self, message: dict[str, Any]) -> None:
        ((kind, value),) = message.items()
        if kind == "start":
            self._start(value)
            return
        assert self._run is not None
        if kind == "metrics":
            self._metrics(value)
        elif kind == "figures":
            self._run.figures(value)
        elif kind == "bundle":
            if value["mode"] != "none":
                self._run.bundle(Path(value["folder"]), value["mode"])
        else:
            self._run.finish(value)

    def _start(self, start: dict[str, Any]) -> None:
        self._path = Path(start["state"])
        with contextlib.suppress(OSError, ValueError, AttributeError):
            state = json.loads(self._path.read_text(encoding="utf-8"))
            if state.get("key") == start["key"]:
                self._state = state
        if not self._state:
            self._state = {"key": start["key"], "id": uuid.uuid4().hex, "sent": {}}
            # Before the run is made: a kill between the two must not make a second one.
            self._save()
        run = self._open_run(start["tool"], self._state["id"], start["name"], start["project"], start["parameters"])
        if run.is_new:
            self._state["sent"] = {}
        self._state["address"] = run.address
        self._run = run
        self._save()

    def _metrics(self, records: list[dict[str, float]]) -> None:
        assert self._run is not None
        sent: dict[str, float] = dict(self._state["sent"])
        new = []
        for record in records:
            step = record["step"]
            figures = {key: value for key, value in record.items() if key != "step" and step > sent.get(key, -1)}
            sent |= dict.fromkeys(figures, step)
            if figures:
                new.append({"step": step, **figures})
        if new:
            self._run.log(new)
            self._state["sent"] = sent
            self._save()

    def _save(self) -> None:
        partial = self._path.with_name(self._path.name + ".partial")
        partial.write_text(json.dumps(self._state) + "\n", encoding="utf-8")
        partial.replace(self._path)


def main() -> None:
    """Send what comes on standard input until it ends; an end without "finish" is that of a killed build."""
    with contextlib.suppress(OSError):
        os.nice(10)
    # What a client prints is not an answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    messages: queue.Queue[dict[str, Any]] = queue.Queue(_QUEUED)

    def read() -> None:
        for line in sys.stdin:
            messages.put(json.loads(line))
        messages.put({"finish": "killed"})

    threading.Thread(target=read, daemon=True).start()
    sender = Sender(open_run, say)
    message: dict[str, Any] = {}
    while not sender.take(message):
        try:
            message = messages.get(timeout=_AGAIN)
        except queue.Empty:
            message = {}
    say({"done": True})


if __name__ == "__main__":
    main()
