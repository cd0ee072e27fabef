"""What `gpt2-bundle bench` does: schedules, targets, measuring, reports."""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from serving.errors import InputError
from serving.support.suggestions import did_you_mean

if TYPE_CHECKING:
    from benchmarks.suite.load.schedule import Planned, Schedule
    from benchmarks.suite.resume import Earlier
    from benchmarks.suite.targets.base import Target
    from serving.bundle import Bundle

# Maximum number of rates of a sweep.
_SWEEP_RATES = 16


def run_scenarios(bundle: Bundle, targets: Sequence[str], output: Path | None, as_json: bool, **asked: Any) -> None:
    """Draw schedules, play them against the targets, print tables and verdict, and write the record."""
    from benchmarks.common.hardware import BandwidthProbe, ComputeProbe
    from benchmarks.suite.cold_start import ColdStart, cold_start
    from benchmarks.suite.figures.latency_metrics import Objectives
    from benchmarks.suite.load.clock import WallClock
    from benchmarks.suite.machine.contention import Machine
    from benchmarks.suite.machine.meters import open_meters
    from benchmarks.suite.record import about, keep, write_reports
    from benchmarks.suite.report.markdown import to_markdown, verdict
    from benchmarks.suite.run import measure
    from benchmarks.suite.selfcheck.client_overhead import client_overhead
    from serving.sampling.detokenizer import load_tokenizer

    schedules = _schedules(bundle, asked)
    opened, missing = _targets(bundle, targets, asked, {schedule.scenario for schedule in schedules} == {"steps"})
    limits = {name: asked[f"slo_{name}"] for name in ("ttft", "tpot", "e2e")}
    objectives = Objectives(**{name: None if value is None else value / 1e3 for name, value in limits.items()})
    tokenizer = load_tokenizer(bundle)

    async def start(target: Target, request: Planned) -> ColdStart | None:
        return await cold_start(target, bundle, asked["max_batch"], request)

    header = about(bundle)
    unfinished = output.with_name(f"{output.name}.unfinished") if output is not None else None
    earlier = _unfinished(unfinished, header) if asked["resume"] else None
    kept: list[Path] = []

    def keep_so_far(record: dict[str, Any]) -> None:
        if unfinished is not None:
            keep(header | record, unfinished)
            kept[:] = [unfinished]

    async def work() -> dict[str, Any]:
        clock = WallClock()
        has_server = any("=" in target.name or target.name.startswith("tfserving") for target in opened)
        overhead = await client_overhead(clock) if has_server else None
        record = await measure(
            opened,
            schedules,
            clock,
            missing=missing,
            repeats=asked["repeats"],
            objectives=objectives,
            geometry=bundle.manifest.model,
            machine=Machine(BandwidthProbe(), ComputeProbe(), open_meters(), asked["price_per_hour"]),
            starter=start,
            cold_starts=asked["cold_starts"],
            sweep_seconds=asked["sweep_limit"],
            decode=lambda ids: str(tokenizer.decode(list(ids))),
            earlier=earlier,
            keep=keep_so_far,
            say=lambda line: click.echo(line, err=True),
        )
        return header | record | {"client_overhead_ms": overhead}

    try:
        record = asyncio.run(work())
    except BaseException:
        if kept:
            click.echo(f"{unfinished} keeps what was measured; the same command with --resume continues", err=True)
        raise
    click.echo(to_markdown(record))
    click.echo("\n".join(["Verdict", *(f"  {line}" for line in verdict(record))]))
    if output is not None:
        write_reports(record, output)
        output.with_name(f"{output.name}.unfinished").unlink(missing_ok=True)
    if as_json:
        click.echo(json.dumps(record))


def _targets(
    bundle: Bundle, asked_for: Sequence[str], asked: Mapping[str, Any], only_steps: bool
) -> tuple[list[Target], dict[str, str] | None]:
    """Open the targets; what was not named and is not on this machine comes back with the reason."""
    from benchmarks.suite.targets.open import default_targets, open_defaults, open_target

    emulators, batch = asked["emulators"], asked["max_batch"]
    names = list(dict.fromkeys(asked_for or default_targets(bundle, static=only_steps)))
    strange = set(emulators) - set(names)
    if strange:
        raise InputError(f"--emulator {min(strange)!r} is not among the targets{did_you_mean(min(strange), names)}")
    missing: dict[str, str] | None = None
    if asked_for:
        opened = [open_target(bundle, name, batch=batch, emulator=name in emulators) for name in names]
    else:
        opened, missing = open_defaults(bundle, names, batch=batch, emulators=emulators)
    unmarked = [target.name for target in opened if target.name in emulators and not target.emulator]
    if unmarked:
        raise InputError(f"--emulator {unmarked[0]!r}: this target cannot be an emulator; leave the option out")
    if only_steps and not any(hasattr(each, "runner") for each in opened):
        raise InputError("steps measure graphs in this process; name one, such as ort/fp32 or savedmodel")
    return opened, missing


def _unfinished(path: Path | None, about: Mapping[str, str]) -> Earlier | None:
    """What a run that was ended has left for --output, or None if there is nothing."""
    from benchmarks.suite.record import read_record
    from benchmarks.suite.resume import Earlier

    if path is None:
        raise InputError("--resume continues the record of --output; pass that too")
    if not path.exists():
        return None
    record = read_record(path)
    if any(record.get(name) != value for name, value in about.items()):
        raise InputError(f"{path} is of another bundle; delete it, or leave out --resume")
    return Earlier(record)


def _schedules(bundle: Bundle, asked: Mapping[str, Any]) -> list[Schedule]:
    from benchmarks.common.held_out_text import read_text
    from benchmarks.suite.load.schedule import Lengths, Planner

    context = bundle.manifest.model.n_positions
    planner = Planner(read_text(bundle), context, asked["seed"])
    # Half the context for the prompt and a quarter for the output, or what is usual if that is less.
    prompt = Lengths.parse(asked["prompt_lengths"] or str(min(128, context // 2)))
    made = Lengths.parse(asked["output_lengths"] or str(min(32, context // 4)))
    count, arrivals = asked["requests"], asked["arrivals"]
    found: list[Schedule] = []
    for scenario in asked["scenarios"]:
        if scenario == "steps":
            new = asked["new_tokens"] or min(32, context - 1)
            tokens = asked["prompt_tokens"] or max(1, min(128, context - new))
            found += [planner.steps(batch, tokens, new) for batch in asked["batch_sizes"]]
        elif scenario == "single":
            found.append(planner.single(count, prompt, made))
        elif scenario == "offline":
            found.append(planner.offline(count, prompt, made))
        elif scenario == "server" and asked["trace"] is not None:
            found.append(planner.trace(_recorded(asked["trace"]), prompt, made))
        elif scenario == "server":
            found += [planner.server(count, prompt, made, rate=rate, arrivals=arrivals) for rate in asked["rates"]]
        elif scenario == "concurrency":
            found += [planner.concurrency(clients, count, prompt, made) for clients in asked["clients"]]
        elif scenario == "saturation":
            steps = {"start": asked["sweep_from"], "factor": asked["sweep_factor"], "seconds": asked["sweep_seconds"]}
            found += planner.saturation(prompt, made, **steps, rates=_SWEEP_RATES, arrivals=arrivals)
        else:
            found.append(planner.cold_start(prompt, made))
    return found


def _recorded(path: Path) -> list[float]:
    """Arrival times in seconds, one a line. Raises InputError for anything else."""
    try:
        times = [float(line) for line in path.read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a list of arrival times ({error}); write seconds, one a line") from None
    strange = [time for time in times if not math.isfinite(time)]
    if strange or not times:
        why = f"{strange[0]} is not a time" if strange else "the file is empty"
        raise InputError(f"{path}: {why}; write seconds, one a line")
    return times


def check_output(output: Path | None) -> None:
    """Make the folder of `output`. Raises InputError where no record can be written."""
    if output is None:
        return
    if output.is_dir():
        raise InputError(f"{output}: is a folder; name a file in it, such as {output / 'record.json'}")
    if output.suffix.lower() in (".md", ".csv", ".html"):
        named = output.with_suffix(".json")
        raise InputError(f"{output}: the record is JSON, and {output.suffix} is written next to it; name it {named}")
    output.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(output.parent, os.W_OK):
        raise InputError(f"{output.parent}: this folder cannot be written to; choose another one for --output")
