"""A whole run of the suite: targets take turns on each schedule, repeat by repeat, and a record comes out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from benchmarks.common.hardware import environment
from benchmarks.common.statistics import warm_from
from benchmarks.suite.cold_start import ColdStart
from benchmarks.suite.driver import play
from benchmarks.suite.figures.latency_metrics import Objectives
from benchmarks.suite.figures.record_rows import COLD, Repeat, add_bounds, blank_row, make_point, point_of
from benchmarks.suite.load.clock import Clock
from benchmarks.suite.load.events import Response
from benchmarks.suite.load.schedule import Lengths, Planned, Planner, Schedule
from benchmarks.suite.machine.contention import Machine, Others
from benchmarks.suite.rate_sweep import best, sweep
from benchmarks.suite.record import SCHEMA
from benchmarks.suite.resume import SUSTAINED, Earlier, most_of, session, whole_sweep
from benchmarks.suite.static_batches import play_batches, steps_point
from benchmarks.suite.targets.base import Target, TargetError
from serving.bundle import Geometry
from serving.errors import GPT2BundleError

_WARM_UP_ROUND, _WARM_UP_MAX = 10, 60
# A request of a sweep that takes longer is far behind already, and the sweep must end.
_SWEEP_TIMEOUT = 30.0
# A runtime's threads spin for a while after its last call, and would take the cores from the next one.
_PAUSE = 0.1
Say = Callable[[str], None]
Decode = Callable[[Sequence[int]], str]
Keep = Callable[[dict[str, Any]], None]
Starter = Callable[[Target, Planned], Awaitable[ColdStart | None]]


@dataclass
class _Run:
    """What every scenario needs."""

    targets: Sequence[Target]
    clock: Clock
    objectives: Objectives
    timeout: float
    machine: Machine
    say: Say
    decode: Decode | None
    points: list[dict[str, Any]] = field(default_factory=list)
    measured: list[tuple[dict[str, Any], Schedule]] = field(default_factory=list)
    plays: int = 0

    async def play(self, target: Target, schedule: Schedule, timeout: float | None = None) -> Repeat:
        # Until the target before is still.
        await self.clock.until(self.clock.now() + _PAUSE)
        with self.machine.meters.window() as window:
            responses = await play(schedule, target, self.clock, timeout or self.timeout)
        return Repeat([self._with_text(each) for each in responses], window.reading)

    def _with_text(self, response: Response) -> Response:
        """Servers that give text alone are compared by it, so those that give ids alone need theirs."""
        if self.decode is None or response.text is not None or response.tokens is None:
            return response
        return replace(response, text=self.decode(response.tokens))

    def varied(self, schedule: Schedule) -> Schedule:
        """The schedule with other first tokens each time, so that no prompt comes twice."""
        self.plays += 1
        return schedule.varied(self.plays - 1)

    def in_turns(self, repeat: int) -> Sequence[Target]:
        """The targets; who goes first changes, so that nobody always runs after the same other."""
        start = repeat % len(self.targets)
        return [*self.targets[start:], *self.targets[:start]]

    def add(self, schedule: Schedule, targets: Sequence[Target], played: dict[str, list[Repeat]]) -> None:
        self.add_point(schedule, make_point(schedule, targets, played, self.objectives, self.machine.price_per_hour))

    def add_point(self, schedule: Schedule, point: dict[str, Any]) -> None:
        self.points.append(point)
        self.measured.append((point, schedule))

    def add_bounds(self, geometry: Geometry | None) -> None:
        """Put bounds, by the machine's best rates so far, into the points that this run has measured."""
        if geometry is not None:
            for point, schedule in self.measured:
                add_bounds(point, schedule, geometry, *self.machine.rates())


async def measure(
    targets: list[Target],
    schedules: Sequence[Schedule],
    clock: Clock,
    *,
    missing: dict[str, str] | None = None,
    repeats: int,
    objectives: Objectives,
    geometry: Geometry | None = None,
    timeout: float = 300.0,
    machine: Machine | None = None,
    starter: Starter | None = None,
    cold_starts: int = 5,
    sweep_seconds: float = 120.0,
    decode: Decode | None = None,
    earlier: Earlier | None = None,
    keep: Keep | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Start `targets`, warm them up, play each schedule `repeats` times against all in turn, and return the record.

    A target that does not start is taken out of `targets`, with its reason in `missing`, if that is not None.
    The schema is docs/bench-format.md's. Schedules of a sweep that follow each other are one sweep, in which each
    is played once; those of a cold start are asked `cold_starts` times by `starter`. `geometry` and the probes of
    `machine` give the roofline bounds; `decode` the text of targets that give ids alone. What `earlier` has is
    not measured again; `keep` is given the record so far after each schedule or sweep. Raises InputError where
    `earlier` is of other settings, targets, versions or another machine.
    """
    machine = machine or Machine()
    # Before anything is loaded, since it holds the power of the idle machine.
    energy = machine.meters.describe()
    entries: list[dict[str, Any]] = []
    run = _Run(targets, clock, objectives, timeout, machine, say, decode)
    about = environment()
    settings = {
        "repeats": repeats, "objectives": asdict(objectives), "timeout": timeout, "cold_starts": cold_starts,
        "sweep_seconds": sweep_seconds, "price_per_hour": machine.price_per_hour,
    }  # fmt: skip
    if earlier is not None:
        earlier.check(settings, about, [*(target.name for target in targets), *(missing or ())])

    def so_far() -> dict[str, Any]:
        run.add_bounds(geometry)
        sessions = [*(earlier.sessions if earlier else ()), session(about, machine.rates(), others.share())]
        return {
            "schema": SCHEMA, "environment": about, "settings": settings, "sessions": sessions, **most_of(sessions),
            "energy": energy, "targets": entries, "not_measured": missing or {}, "points": run.points,
        }  # fmt: skip

    try:
        for target in list(targets):
            say(f"{target.name}: loading")
            began = time.monotonic()
            if not await _starts(target, targets, missing):
                continue
            loaded = time.monotonic() - began
            warm = await warm_up(target, schedules[0], clock, timeout)
            entries.append({
                "name": target.name, "label": target.label, "precision": target.precision,
                "emulator": target.emulator, "load_seconds": loaded, **warm,
            })  # fmt: skip
        if earlier is not None:
            earlier.check_started([target.name for target in targets])
        others = Others([process for process in (target.pid() for target in targets) if process is not None])
        for part in _parts(schedules):
            if earlier is not None and (known := earlier.points(part)):
                say(f"{part[0].scenario}, {part[0].point}: is there already")
                run.points += known
                continue
            if part[0].scenario == "saturation":
                await _sweep(run, part, sweep_seconds)
            elif part[0].scenario == "cold-start":
                await _cold(run, part[0], starter, cold_starts)
            elif part[0].scenario == "steps":
                _steps(run, part[0], repeats)
            else:
                await _repeat(run, part[0], repeats)
            if keep is not None:
                keep(so_far())
        return so_far()
    finally:
        for target in targets:
            await target.stop()


def _parts(schedules: Sequence[Schedule]) -> Iterator[list[Schedule]]:
    """What is measured as one: a schedule, or those of a sweep."""
    for scenario, group in itertools.groupby(schedules, key=lambda schedule: schedule.scenario):
        if scenario == "saturation":
            yield list(group)
        else:
            yield from ([schedule] for schedule in group)


async def _starts(target: Target, targets: list[Target], missing: dict[str, str] | None) -> bool:
    """Start a target; False if it does not and need not. Raises GPT2BundleError if it must, or none would be left."""
    try:
        await target.start()
    except GPT2BundleError as error:
        if missing is None or len(targets) == 1:
            raise
        missing[target.name] = str(error)
        targets.remove(target)
        await target.stop()
        return False
    return True


async def warm_up(target: Target, like: Schedule, clock: Clock, timeout: float) -> dict[str, Any]:
    """Send one request at a time, prompts of `like`, until MSER-5 sees a steady end-to-end latency, 60 at most.

    `warm` is False if it never did.
    """
    first = like.requests[0]
    text = [token for request in like.requests for token in request.prompt]
    made = min(8, first.new_tokens)
    lengths = Lengths(len(first.prompt), len(first.prompt)), Lengths(made, made)
    latencies: list[float] = []
    cut = None
    while cut is None and len(latencies) < _WARM_UP_MAX:
        # Other prompts in each round, or a server that keeps prompts would seem to warm up at the second.
        planner = Planner(text, len(first.prompt) + made, seed=len(latencies))
        responses = await play(planner.single(_WARM_UP_ROUND, *lengths), target, clock, timeout)
        latencies += [response.finished - response.scheduled for response in responses]
        cut = warm_from(latencies)
    return {"warm_up_requests": len(latencies), "warm_after": cut, "warm": cut is not None}


async def _repeat(run: _Run, schedule: Schedule, repeats: int) -> None:
    played: dict[str, list[Repeat]] = {target.name: [] for target in run.targets}
    for repeat in range(repeats):
        run.machine.sample()
        run.say(f"{schedule.scenario}, {schedule.point}: repeat {repeat + 1} of {repeats}")
        asked = run.varied(schedule)
        for target in run.in_turns(repeat):
            played[target.name].append(await run.play(target, asked))
    run.add(schedule, run.targets, played)


def _steps(run: _Run, schedule: Schedule, repeats: int) -> None:
    """One batch size, for those targets that are a graph in this process."""
    known = {target.name: getattr(target, "runner", None) for target in run.targets}
    runners = {name: runner for name, runner in known.items() if runner is not None}
    if not runners:
        run.say(f"{schedule.scenario}, {schedule.point}: left out, no target is a graph in this process")
        return
    played = play_batches(runners, schedule, repeats, machine=run.machine, say=run.say)
    run.add_point(schedule, steps_point(schedule, played, run.targets))


async def _sweep(run: _Run, schedules: Sequence[Schedule], seconds: float) -> None:
    named = {target.name: target for target in run.targets}
    asked = [run.varied(schedule) for schedule in schedules]
    played: list[dict[str, list[Repeat]]] = [{} for _ in schedules]

    async def once(name: str, schedule: Schedule, place: int) -> Sequence[Response]:
        if not played[place]:
            run.machine.sample()
            run.say(f"saturation, {schedule.point}")
        repeat = await run.play(named[name], asked[place], min(run.timeout, _SWEEP_TIMEOUT))
        played[place][name] = [repeat]
        return repeat.responses

    standings = await sweep(list(named), schedules, run.clock, run.objectives, seconds, once)
    for place, schedule in enumerate(schedules):
        there = [target for target in run.targets if target.name in played[place]]
        if not there:
            break
        run.add(schedule, there, played[place])
        for row in run.points[-1]["rows"]:
            row["pace"] = asdict(standings[row["target"]].paces[place])
    summaries = {name: standing.summary() for name, standing in standings.items()}
    rows = [
        blank_row(target, {SUSTAINED: [summaries[target.name]["sustained"]]}) | {"sweep": summaries[target.name]}
        for target in run.targets
    ]
    whole = whole_sweep(schedules)
    run.add_point(whole, point_of(whole, rows, ()) | {"winners": {SUSTAINED: best(summaries)}})


async def _cold(run: _Run, schedule: Schedule, starter: Starter | None, count: int) -> None:
    rows = {target.name: blank_row(target, {name: [] for name in COLD}) for target in run.targets}
    for repeat in range(count):
        run.say(f"{schedule.scenario}, {schedule.point}: {repeat + 1} of {count}")
        request = run.varied(schedule).requests[0]
        for target in run.in_turns(repeat):
            row, found = rows[target.name], None
            try:
                found = await starter(target, request) if starter is not None else None
            except TargetError as error:
                row["errors"] = sorted({*row["errors"], str(error)})
            for name, seconds in zip(COLD, (found.load, found.first_token) if found else (None, None), strict=True):
                row["figures"][name].append(None if seconds is None else seconds * 1e3)
            if found and found.peak_rss_bytes:
                row["peak_rss_bytes"] = max(row["peak_rss_bytes"] or 0, found.peak_rss_bytes)
    run.add_point(schedule, point_of(schedule, list(rows.values()), COLD))
