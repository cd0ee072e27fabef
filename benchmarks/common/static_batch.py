"""The static-batch interface: prefill of prompts of equal length and greedy decode steps, in this process or another.

A runtime process reads one JSON object a line and answers with one. `{"do": "load", ...LoadRequest}` gets
`{"versions": {...}, "notes": [...], "emulator": false}`, `{"do": "run", "prompts": [[id]], "new_tokens": n}` gets a
`BatchRun`, and a failure gets `{"error": "one line"}`. The module needs only Python: peers have none of this project's
packages.
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
from typing import Any, Protocol


@dataclass(frozen=True)
class LoadRequest:
    """What to load: a bundle, which is a Hugging Face folder, its weights' precision, and the folder for conversions.

    `capacity` is the maximum number of positions of a row, and `rows` the maximum batch size.
    """

    bundle: str
    precision: str
    work: str
    threads: int
    rows: int
    capacity: int


@dataclass
class BatchRun:
    """Seconds of a prefill and of each decode step, the greedy tokens ([1 + steps][rows]), and figures of meters."""

    prefill: float = 0.0
    steps: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    metered: dict[str, float | None] = field(default_factory=dict)


class BatchRunner(Protocol):
    """A loaded runtime."""

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> BatchRun:
        """Prefill prompts of one length, then take `new_tokens` greedy steps."""


class NotedRunner(BatchRunner, Protocol):
    """A runner in a process of its own; `notes` say what its times contain besides the model's work."""

    @property
    def notes(self) -> Sequence[str]: ...


class Stopwatch:
    """Seconds since the last reading."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap, and start another."""
        now = time.perf_counter()
        passed, self.began = now - self.began, now
        return passed


class BackendRunner:
    """A backend of `serving` as a runner."""

    def __init__(self, backend: Any, notes: Sequence[str] = ()) -> None:
        self.backend, self.notes = backend, notes

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> BatchRun:
        """See `BatchRunner.run`."""
        run, watch = BatchRun(), Stopwatch()
        state, logits = self.backend.prefill(prompts, len(prompts[0]) + new_tokens)
        run.prefill = watch.lap()
        tokens = logits.argmax(-1)
        run.tokens.append(tokens.tolist())
        for _ in range(new_tokens):
            watch.lap()
            logits = self.backend.decode(state, tokens)
            run.steps.append(watch.lap())
            tokens = logits.argmax(-1)
            run.tokens.append(tokens.tolist())
        return run


class Generates(Protocol):
    """What continues prompts greedily; rows may be shorter after the end token."""

    def generate(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]: ...


class GenerateRunner:
    """The prefill is a call for one token; a step is what a call for many takes longer / the tokens that it adds."""

    def __init__(self, model: Generates, notes: Sequence[str] = (), emulator: bool = False) -> None:
        self.model, self.emulator = model, emulator
        self.notes = ["a step is (a whole call - a call of one token) / steps", *notes]

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> BatchRun:
        """See `BatchRunner.run`."""
        run, watch = BatchRun(), Stopwatch()
        self.model.generate(prompts, max_new_tokens=1)
        run.prefill = watch.lap()
        rows = self.model.generate(prompts, max_new_tokens=1 + new_tokens)
        whole = watch.lap()
        steps = max(map(len, rows)) - 1
        if steps:
            run.steps = [max(whole - run.prefill, 0.0) / steps] * steps
        run.tokens = [[row[step] if step < len(row) else -1 for row in rows] for step in range(1 + steps)]
        return run


@contextlib.contextmanager
def converted(target: Path) -> Iterator[Path | None]:
    """Yield a folder for a conversion, which becomes `target` if nothing fails; yield None if `target` exists."""
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


def serve(load: Callable[[LoadRequest], NotedRunner], packages: Sequence[str]) -> None:
    """Answer requests until the input ends. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    runner: NotedRunner | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request.pop("do") == "load":
                runner = load(LoadRequest(**request))
                emulator = bool(getattr(runner, "emulator", False))
                answer: object = {"versions": _versions(packages), "notes": list(runner.notes), "emulator": emulator}
            else:
                assert runner is not None, "run before load"
                answer = asdict(runner.run(request["prompts"], request["new_tokens"]))
        except Exception as error:  # Whatever a library raises, the parent gets it as a line.
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
