"""What a contestant's process speaks: one JSON object a line, answered by one.

`{"do": "load", ...Job}` gets `{"versions": {...}, "notes": [...]}`, `{"do": "run", "prompts": [[id]], "new_tokens": n}`
gets a `Run`, and a failure `{"error": "one line"}`. Needs only Python: peers have none of this project's packages.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Protocol


@dataclass(frozen=True)
class Job:
    """What to load: a bundle, which is a Hugging Face folder, its weights' precision, and where conversions are kept.

    `capacity` is the most positions that a row reaches, and `rows` the most rows that a batch has.
    """

    bundle: str
    precision: str
    work: str
    threads: int
    rows: int
    capacity: int


@dataclass
class Run:
    """Seconds of a prefill and of each step behind it, and the greedy tokens: [1 + steps][rows]."""

    prefill: float = 0.0
    steps: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)


class Contestant(Protocol):
    """A loaded runtime. `notes` say what its times hold beside the model's own work."""

    @property
    def notes(self) -> Sequence[str]: ...

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Run:
        """Prefill prompts of one length, then take `new_tokens` greedy steps."""
        ...


class Clock:
    """Seconds since the last reading."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap, and begin another."""
        now = time.perf_counter()
        passed, self.began = now - self.began, now
        return passed


@contextlib.contextmanager
def converted(target: Path) -> Iterator[Path | None]:
    """Yield a folder to write a conversion to, which becomes `target` if nothing fails; yield None if it is there."""
    if target.exists():
        yield None
        return
    draft = target.with_name(f"{target.name}.{os.getpid()}")
    draft.mkdir(parents=True)
    try:
        yield draft
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def serve(load: Callable[[Job], Contestant], packages: Sequence[str]) -> None:
    """Answer requests until the input ends. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    contestant: Contestant | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request.pop("do") == "load":
                contestant = load(Job(**request))
                answer: object = {"versions": _versions(packages), "notes": list(contestant.notes)}
            else:
                assert contestant is not None, "run before load"
                answer = asdict(contestant.run(request["prompts"], request["new_tokens"]))
        except Exception as error:  # Whatever a library raises, the parent gets it as a line.
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        _send(answers, answer)


def _send(stream: IO[str], answer: object) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
