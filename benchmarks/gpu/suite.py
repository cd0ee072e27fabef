"""Contests in order of importance within a budget of seconds, each kept in the record as soon as it is over."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.hardware import usable_cores
from benchmarks.common.statistics import summarise
from benchmarks.gpu.contestants import Contestant
from benchmarks.gpu.device import MemoryWatch, floor_ms
from benchmarks.peers.child import Child
from benchmarks.peers.protocol import Job, Run
from serving.bundle import Bundle
from serving.errors import GPT2BundleError

# Of the time that is left, what one contestant may take at most.
_SHARE = 0.4


@dataclass(frozen=True)
class Setting:
    """Lengths in tokens; `repeats` runs are timed, behind one that is not."""

    prompt_tokens: int
    new_tokens: int
    repeats: int
    device: str


class Suite:
    """Runs contestants on a bundle, and adds to `record`; `keep` is called after each contest."""

    def __init__(
        self,
        bundle: Bundle,
        setting: Setting,
        record: dict[str, Any],
        work: Path,
        seconds: float,
        keep: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self.bundle, self.setting, self.record, self.work = bundle, setting, record, work
        self.keep, self.say = keep, say
        self._deadline = time.monotonic() + seconds

    def hold(self, contestants: Sequence[Contestant], batch_sizes: Sequence[int]) -> None:
        """Run what the record does not hold yet; what failed or was skipped is tried again."""
        done = {(each["contestant"], each["batch_size"]) for each in self.record["contests"] if "error" not in each}
        wanted = {
            contestant: [size for size in batch_sizes if (contestant.name, size) not in done]
            for contestant in contestants
        }
        names = {(contestant.name, size) for contestant, sizes in wanted.items() for size in sizes}
        for part in ("contests", "skipped"):
            self.record[part] = [
                each for each in self.record[part] if (each["contestant"], each["batch_size"]) not in names
            ]
        for contestant, sizes in wanted.items():
            if sizes:
                self._hold(contestant, sizes)
        _flag(self.record["contests"])
        self.keep()

    def _hold(self, contestant: Contestant, sizes: Sequence[int]) -> None:
        """One process, batch by batch; after an error the others are not tried, since the process may be gone.

        It has at most a share of the time that is left, so that one that compiles for long leaves some to the others.
        """
        pending = list(sizes)
        end = time.monotonic() + _SHARE * self._left()
        if self._left() <= 0:
            self._skip(contestant, pending)
            return
        setting = self.setting
        job = Job(
            str(self.bundle.folder),
            contestant.precision,
            str(self.work),
            usable_cores(),
            max(sizes),
            setting.prompt_tokens + setting.new_tokens,
        )
        command = contestant.command(setting.device)
        log = self.work / f"{contestant.name}.log"
        watch = MemoryWatch(setting.device)
        with watch, Child(contestant.name, command, log, job.threads, setting.device != "cpu") as child:
            watch.follow(child.pid)
            timer = threading.Timer(end - time.monotonic(), child.kill)
            timer.daemon = True
            timer.start()
            try:
                child.load(job)
                while pending and time.monotonic() < end:
                    rows = pending[0]
                    figures = self._measure(child, contestant, rows)
                    figures["gpu_memory_bytes"] = {"peak": watch.peak, "whole_gpu": watch.whole}
                    self._add(contestant, rows, figures)
                    pending.pop(0)
            except GPT2BundleError as error:
                if time.monotonic() < end:
                    for rows in pending:
                        self._add(contestant, rows, {"error": str(error).replace(str(log), log.name)})
                    pending = []
            finally:
                timer.cancel()
        self._skip(contestant, pending)

    def _measure(self, child: Child, contestant: Contestant, rows: int) -> dict[str, Any]:
        setting, geometry = self.setting, self.bundle.manifest.model
        random = np.random.default_rng(rows)
        prompts = random.integers(0, geometry.vocab_size, (rows, setting.prompt_tokens)).tolist()
        child.run(prompts, setting.new_tokens)  # Compiles, captures and takes memory.
        runs = [child.run(prompts, setting.new_tokens) for _ in range(setting.repeats)]
        # A run's steps depend on each other, so the run is the sample.
        steps = [float(np.median(run.steps)) for run in runs if run.steps]
        decode, prefill = summarise([1e3 * step for step in steps]), summarise([1e3 * run.prefill for run in runs])
        positions = setting.prompt_tokens + setting.new_tokens / 2
        bounded = contestant.bounded or setting.device == "cpu"
        rates = self.record["rates"] if bounded else None
        floor = floor_ms(geometry, contestant.precision, contestant.cache, rows, positions, rates)
        return {
            "decode_ms": asdict(decode) if decode else None,
            "prefill_ms": asdict(prefill) if prefill else None,
            "decode_tokens_per_second": 1e3 * rows / decode.median if decode else None,
            **floor,
            "floor_over_decode": floor["floor_ms"] / decode.median
            if decode and decode.median and floor["floor_ms"]
            else None,
            "tokens_sha256": [_sha256(run) for run in runs],
            "versions": child.versions,
            "notes": [*filter(None, [contestant.note]), *child.notes],
        }

    def _add(self, contestant: Contestant, rows: int, figures: dict[str, Any]) -> None:
        place = {"contestant": contestant.name, "precision": contestant.precision, "batch_size": rows}
        self.record["contests"].append({**place, **figures})
        decode = figures.get("decode_ms")
        told = figures.get("error") or (f"{decode['median']:.3f} ms a step" if decode else "no step")
        self.say(f"{contestant.name}, batch {rows}: {told}")
        self.keep()

    def _skip(self, contestant: Contestant, sizes: Sequence[int]) -> None:
        self.record["skipped"] += [{"contestant": contestant.name, "batch_size": size} for size in sizes]
        for size in sizes:
            self.say(f"{contestant.name}, batch {size}: skipped, its time is used up")
        self.keep()

    def _left(self) -> float:
        return self._deadline - time.monotonic()


def _sha256(run: Run) -> str:
    return hashlib.sha256(json.dumps(run.tokens).encode()).hexdigest()


def _flag(contests: Sequence[dict[str, Any]]) -> None:
    """Say of each contest whether its runs agree, and whether they agree with the batch size's first contestant."""
    first: dict[int, str] = {}
    for contest in contests:
        with contextlib.suppress(KeyError):
            hashes = contest["tokens_sha256"]
            first.setdefault(contest["batch_size"], hashes[0])
            contest["tokens_steady"] = len(set(hashes)) == 1
            contest["tokens_as_first"] = hashes[0] == first[contest["batch_size"]]
