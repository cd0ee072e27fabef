"""Runtimes under test in rounds of static batches, each in its own process, into one record of the suite's schema."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.hardware import BandwidthProbe, ComputeProbe, environment, usable_cores
from benchmarks.common.held_out_text import cut_prompts
from benchmarks.common.runtime_process import RuntimeProcess
from benchmarks.common.static_batch import LoadRequest
from benchmarks.peers.runtimes import Runtime
from benchmarks.suite.figures.record_rows import STEPS, add_bounds, blank_row, point_of
from benchmarks.suite.load.schedule import Planned, Schedule
from benchmarks.suite.machine.contention import Machine, Others
from benchmarks.suite.machine.meters import Meters
from benchmarks.suite.resume import RATES, most_of, session
from benchmarks.suite.static_batches import play_batches, steps_point
from serving.bundle import Bundle
from serving.errors import GPT2BundleError

# Of the time that is left, what one GPU runtime may take at most.
_SHARE = 0.4


@dataclass(frozen=True)
class Settings:
    """Lengths in tokens, and the number of rounds. Without `seconds` there is no time limit.

    `alone` measures one runtime after the other, as on a GPU, whose memory they do not share.
    """

    prompt_tokens: int
    new_tokens: int
    repeats: int
    device: str = "cpu"
    alone: bool = False
    seconds: float | None = None


@dataclass
class Comparison:
    """Runs runtimes on a bundle, and adds to `record`.

    Attributes:
        text: token ids that prompts are cut from.
        environments: the folder of the peer environments.
        work: the folder for conversions and logs.
        rates: what the device reached, as from `measure_rates`; in turns, the probes measure between the rounds.
        meters: read over each run of a batch.
        keep: called after each point.
        say: gets a line of progress.
    """

    bundle: Bundle
    text: Sequence[int]
    settings: Settings
    record: dict[str, Any]
    environments: Path
    work: Path
    rates: dict[str, Any] | None
    meters: Meters
    keep: Callable[[], None]
    say: Callable[[str], None]
    began: float = field(default_factory=time.monotonic)

    def run(self, runtimes: Sequence[Runtime], batch_sizes: Sequence[int]) -> None:
        """Measure all runtimes of a precision in turns, or one after the other, batch by batch.

        A runtime that fails is in the record with its error.
        """
        if self.settings.alone:
            for runtime in runtimes:
                self._group([runtime], batch_sizes)
            return
        for size in batch_sizes:
            for precision in dict.fromkeys(each.precision for each in runtimes):
                self._group([each for each in runtimes if each.precision == precision], [size])

    def _group(self, runtimes: Sequence[Runtime], sizes: Sequence[int]) -> None:
        """Processes that take turns at each batch size, until their share of the time is used up."""
        limit, pending, end = self.settings.seconds, list(sizes), float("inf")
        failed: dict[str, str] = {}
        with ExitStack() as stack:
            if limit is not None:
                left = limit - (time.monotonic() - self.began)
                end = time.monotonic() + _SHARE * left
            if time.monotonic() < end:
                processes = [stack.enter_context(self._start(each, sizes[0])) for each in runtimes]
                if limit is not None:
                    # A runtime that compiles for long leaves time to the others.
                    timer = threading.Timer(end - time.monotonic(), processes[0].kill)
                    timer.daemon = True
                    timer.start()
                    stack.callback(timer.cancel)
                for process in processes:
                    self._load(process, max(sizes), failed)
            while pending and time.monotonic() < end:
                if not self._measure(runtimes, processes, pending[0], failed, end):
                    break
                pending.pop(0)
        for size in pending:
            for runtime in runtimes:
                self.say(f"{runtime.name}, batch {size}: skipped, its time is used up")
                self.record["not_measured"][f"{runtime.name}, batch {size}"] = "no time was left"
        if pending:
            self.keep()

    def _start(self, runtime: Runtime, size: int) -> RuntimeProcess:
        log = self.work / "logs" / f"{runtime.name.replace('/', '-')}-{size}.log"
        command = runtime.command(self.settings.device, self.environments)
        gpu = self.settings.device != "cpu"
        return RuntimeProcess(runtime.name, runtime.precision, command, log, usable_cores(), gpu)

    def _load(self, process: RuntimeProcess, rows: int, failed: dict[str, str]) -> None:
        """Load a runtime, and describe it in the record."""
        self.say(f"{process.name} loads")
        request = LoadRequest(
            bundle=str(self.bundle.folder.absolute()),
            precision=process.precision,
            work=str(self.work.absolute()),
            threads=usable_cores(),
            rows=rows,
            capacity=self.settings.prompt_tokens + self.settings.new_tokens + 1,
        )
        started = time.monotonic()
        try:
            process.load(request)
        except GPT2BundleError as error:
            failed[process.name] = str(error)
            self.say(f"{process.name} is left out: {error}")
        told = ", ".join(f"{name} {version}" for name, version in process.versions.items())
        entry: dict[str, Any] = {"name": process.name, "label": told or "did not load", "precision": process.precision}
        entry |= {"emulator": process.emulator, "load_seconds": time.monotonic() - started, "warm_after": 1}
        others = [each for each in self.record["targets"] if each["name"] != process.name]
        self.record["targets"] = [*others, {**entry, "warm": True, "versions": process.versions}]

    def _measure(
        self,
        runtimes: Sequence[Runtime],
        processes: Sequence[RuntimeProcess],
        size: int,
        failed: dict[str, str],
        end: float,
    ) -> bool:
        """Add the point of one batch size; False if the runtime was killed because its time was used up."""
        settings, alone = self.settings, self.settings.alone
        schedule = self._schedule("" if alone else runtimes[0].precision, size)
        machine = Machine(meters=self.meters) if alone else Machine(BandwidthProbe(), ComputeProbe(), self.meters)
        others, about = Others([process.pid for process in processes]), environment()
        played = play_batches(
            {process.name: process for process in processes if process.name not in failed},
            schedule,
            settings.repeats,
            # What compiles or captures a graph does so for the shapes of all steps.
            warm_up_steps=settings.new_tokens if alone else 2,
            machine=machine,
            say=self.say,
            failed=failed,
        )
        if failed and time.monotonic() >= end:
            return False
        point = steps_point(schedule, played, processes)
        bandwidth, rate = machine.rates()
        rates: Any = rate
        if self.rates is not None:
            bandwidth, suffix = self.rates["read_bytes_per_second"], "_flops_per_second"
            rates = {name.removesuffix(suffix): each for name, each in self.rates.items() if name.endswith(suffix)}
        caches = {each.name: each.cache for each in runtimes}
        add_bounds(point, schedule, self.bundle.manifest.model, bandwidth, rates, caches)
        for runtime, process in zip(runtimes, processes, strict=True):
            row = next((each for each in point["rows"] if each["target"] == runtime.name), None)
            if row is None:
                row = blank_row(process, {name: [] for name in (*STEPS, "step_tokens_per_second")})
                row["errors"] = [failed[runtime.name].replace(str(process.log), process.log.name)]
                point["rows"].append(row)
            row["notes"] = [*row["notes"], *filter(None, [runtime.note]), *process.notes]
            # A GPU's runtimes that are rehearsed on the CPU are bounded by it.
            if not runtime.bounded and (settings.device != "cpu" or not alone):
                row |= {"bound_ttft_ms": None, "bound_inter_token_ms": None}
        point["session"] = session(about, machine.rates(), others.share())
        self._add(schedule, point)
        return True

    def _schedule(self, precision: str, size: int) -> Schedule:
        """The prompts of a batch size; a precision is a point of its own, as its runtimes take turns."""
        prompts = cut_prompts(self.text, size, self.settings.prompt_tokens)
        requests = [Planned(row, tuple(each), self.settings.new_tokens, 0.0) for row, each in enumerate(prompts)]
        lengths = {"low": self.settings.prompt_tokens, "high": self.settings.prompt_tokens, "distribution": "fixed"}
        settings = {"requests": size, "prompt": lengths, **({"precision": precision} if precision else {})}
        return Schedule("steps", f"{f'{precision}, ' if precision else ''}batch {size}", settings, tuple(requests))

    def _add(self, schedule: Schedule, point: dict[str, Any]) -> None:
        """Put a point into the record, instead of an older one; one runtime after the other, with its other rows.

        Those that did not take turns are not compared: a drift of the device would be in their ratios.
        """
        points: list[dict[str, Any]] = self.record["points"]
        older = next((each for each in points if each["point"] == point["point"]), None)
        if self.settings.alone:
            names = {row["target"] for row in point["rows"]}
            rows = [row for row in (older["rows"] if older else ()) if row["target"] not in names]
            _mark_other_outputs(rows, point["rows"], schedule)
            nothing = {"winners": dict.fromkeys(STEPS), "comparisons": dict.fromkeys(STEPS)}
            point = point_of(schedule, [*rows, *point["rows"]], ()) | {"session": point["session"], **nothing}
        points[:] = sorted([*(each for each in points if each is not older), point], key=_place)
        self.record["sessions"].append(point["session"])
        self.record |= most_of(self.record["sessions"])
        if self.rates is not None:
            self.record[RATES[0]] = self.rates["read_bytes_per_second"]
            self.record[RATES[1]] = self.rates.get(RATES[1])
        self.keep()


def _place(point: dict[str, Any]) -> int:
    size: int = point["settings"]["requests"]
    return size


def new_record(header: dict[str, str], settings: Settings, schema: str) -> dict[str, Any]:
    """Return a record without points."""
    record: dict[str, Any] = {"schema": schema, **header, "environment": environment()}
    record |= {"settings": asdict(settings) | {"objectives": {}}, "sessions": []}
    return record | most_of([]) | {"targets": [], "not_measured": {}, "points": []}


def _mark_other_outputs(rows: list[dict[str, Any]], added: list[dict[str, Any]], schedule: Schedule) -> None:
    """Compare the outputs of runtimes whose processes have ended, by their hashes."""
    everyone = [request.index for request in schedule.requests]
    for row in rows:
        for other in added:
            same = row["outputs_sha256"] == other["outputs_sha256"] or row["errors"] or other["errors"]
            row["differing_requests"][other["target"]] = other["differing_requests"][row["target"]] = (
                [] if same else everyone
            )
