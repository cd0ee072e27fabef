"""`gpt2-bundle bench` with a scenario, and what is done with its records."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from serving.commands.param_types import Number
from serving.errors import InputError
from serving.support.suggestions import did_you_mean

if TYPE_CHECKING:
    from benchmarks.suite.load.schedule import Planned, Schedule
    from benchmarks.suite.resume import Earlier
    from benchmarks.suite.targets.base import Target
    from serving.bundle import Bundle

# Rates of a sweep at most; `Planner.saturation` has them grow by a factor.
_SWEEP_RATES = 16


def run_scenarios(bundle: Bundle, targets: Sequence[str], output: Path | None, as_json: bool, **asked: Any) -> None:
    """Draw or read schedules, play them against the targets, print the tables and write the record."""
    from benchmarks.common.hardware import BandwidthProbe, ComputeProbe
    from benchmarks.suite.cold_start import ColdStart, cold_start
    from benchmarks.suite.figures.latency_metrics import Objectives
    from benchmarks.suite.load.clock import WallClock
    from benchmarks.suite.load.schedule import save_schedules
    from benchmarks.suite.machine.contention import Machine
    from benchmarks.suite.machine.meters import Meters
    from benchmarks.suite.report.html import to_page
    from benchmarks.suite.report.markdown import to_markdown
    from benchmarks.suite.report.tables import to_csv
    from benchmarks.suite.run import measure
    from benchmarks.suite.selfcheck.client_overhead import client_overhead
    from benchmarks.suite.static_batches import is_static
    from benchmarks.suite.targets.open import default_targets, open_defaults, open_target
    from serving.bundle.manifest import MANIFEST_NAME
    from serving.sampling.detokenizer import load_tokenizer

    schedules = _schedules(bundle, asked)
    if asked["save_schedule"] is not None:
        save_schedules(asked["save_schedule"], schedules)
    names = list(dict.fromkeys(targets or default_targets(bundle)))
    strange = set(asked["stand_ins"]) - set(names)
    if strange:
        raise InputError(f"--stand-in {min(strange)!r} is none of the targets{did_you_mean(min(strange), names)}")
    # What was asked for by name must be there; of the rest the record says why it is not.
    missing: dict[str, str] | None = None
    if targets:
        batch, marked = asked["max_batch"], asked["stand_ins"]
        opened = [open_target(bundle, name, batch=batch, stand_in=name in marked) for name in names]
    else:
        opened, missing = open_defaults(bundle, names, batch=asked["max_batch"], stand_ins=asked["stand_ins"])
    unmarked = [target.name for target in opened if target.name in asked["stand_ins"] and not target.stand_in]
    if unmarked:
        raise InputError(f"--stand-in {unmarked[0]!r}: this is what it says it is, and stands in for nothing")
    if {schedule.scenario for schedule in schedules} == {"steps"} and not any(is_static(each) for each in opened):
        raise InputError("steps are measured of a graph in this process; name one, such as ort/fp32 or savedmodel")
    limits = {name: asked[f"slo_{name}"] for name in ("ttft", "tpot", "e2e")}
    objectives = Objectives(**{name: None if value is None else value / 1e3 for name, value in limits.items()})

    tokenizer = load_tokenizer(bundle)
    machine = Machine(BandwidthProbe(), ComputeProbe(), Meters(), asked["price_per_hour"])

    async def start(target: Target, request: Planned) -> ColdStart | None:
        return await cold_start(target, bundle, asked["max_batch"], request)

    about = {"bundle": bundle.manifest.name, "manifest_sha256": _sha256(bundle.folder / MANIFEST_NAME)}
    unfinished = output.with_name(f"{output.name}.unfinished") if output is not None else None
    earlier = _unfinished(unfinished, about) if asked["resume"] else None
    is_kept = False

    def keep(record: dict[str, Any]) -> None:
        nonlocal is_kept
        if unfinished is not None:
            draft = unfinished.with_name(f"{unfinished.name}.draft")
            draft.write_text(json.dumps(about | record) + "\n", encoding="utf-8")
            draft.replace(unfinished)
            is_kept = True

    async def work() -> dict[str, Any]:
        clock = WallClock()
        overhead = await client_overhead(clock) if _has_server(names) else None
        record = await measure(
            opened,
            schedules,
            clock,
            missing=missing,
            repeats=asked["repeats"],
            objectives=objectives,
            geometry=bundle.manifest.model,
            machine=machine,
            starter=start,
            cold_starts=asked["cold_starts"],
            sweep_seconds=asked["sweep_limit"],
            decode=lambda ids: str(tokenizer.decode(list(ids))),
            earlier=earlier,
            keep=keep,
            say=lambda line: click.echo(line, err=True),
        )
        return record | {"client_overhead_ms": overhead}

    try:
        record = about | asyncio.run(work())
    except BaseException:
        if is_kept:
            click.echo(f"{unfinished} keeps what was measured; the same command with --resume goes on", err=True)
        raise
    click.echo(to_markdown(record))
    if output is not None:
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        output.with_suffix(".md").write_text(to_markdown(record), encoding="utf-8")
        output.with_suffix(".csv").write_text(to_csv(record), encoding="utf-8")
        output.with_suffix(".html").write_bytes(to_page(record))
    if unfinished is not None:
        unfinished.unlink(missing_ok=True)
    if as_json:
        click.echo(json.dumps(record))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _unfinished(path: Path | None, about: Mapping[str, str]) -> Earlier | None:
    """What a run that was ended has left for --output, or None if there is nothing."""
    from benchmarks.suite.regression_gate import read_record
    from benchmarks.suite.resume import Earlier

    if path is None:
        raise InputError("--resume goes on with the record of --output; pass that too")
    if not path.exists():
        return None
    record = read_record(path)
    if any(record.get(name) != value for name, value in about.items()):
        raise InputError(f"{path} is of another bundle; delete it, or pass no --resume")
    return Earlier(record)


def _has_server(names: Sequence[str]) -> bool:
    return any("=" in name or name.startswith("tfserving") for name in names)


def _schedules(bundle: Bundle, asked: Mapping[str, Any]) -> list[Schedule]:
    from benchmarks.common.bundle_targets import read_text
    from benchmarks.suite.load.schedule import Lengths, Planner, read_schedules

    model = bundle.manifest.model
    if asked["schedule"] is not None:
        return read_schedules(asked["schedule"], model.n_positions, model.vocab_size)
    planner = Planner(read_text(bundle), model.n_positions, asked["seed"])
    # Half the context for the prompt and a quarter for the output, or what is usual if that is less.
    prompt = Lengths.parse(asked["prompt_lengths"] or str(min(128, model.n_positions // 2)))
    made = Lengths.parse(asked["output_lengths"] or str(min(32, model.n_positions // 4)))
    count, found = asked["requests"] or 16, []
    for scenario in asked["scenarios"]:
        if scenario == "steps":
            new = asked["new_tokens"] or min(32, model.n_positions - 1)
            tokens = asked["prompt_tokens"] or max(1, min(128, model.n_positions - new))
            found += [planner.steps(batch, tokens, new) for batch in asked["batch_sizes"]]
        elif scenario == "single":
            found.append(planner.single(count, prompt, made))
        elif scenario == "offline":
            found.append(planner.offline(count, prompt, made))
        elif scenario == "server":
            trace = _trace(asked["trace"])
            replayed = asked["requests"] or max(count, len(trace))
            for rate in asked["rates"]:
                how = {"rate": rate, "arrivals": asked["arrivals"], "trace": trace}
                found.append(planner.server(replayed, prompt, made, **how))
        elif scenario == "concurrency":
            found += [planner.concurrency(clients, count, prompt, made) for clients in asked["clients"]]
        elif scenario == "saturation":
            steps = {"start": asked["sweep_from"], "factor": asked["sweep_factor"], "seconds": asked["sweep_seconds"]}
            found += planner.saturation(prompt, made, **steps, rates=_SWEEP_RATES, arrivals=asked["arrivals"])
        elif scenario == "cold-start":
            found.append(planner.cold_start(prompt, made))
        else:
            prompts = asked["grid_prompts"] or sorted({max(1, prompt.high // part) for part in (4, 2, 1)})
            outputs = asked["grid_outputs"] or sorted({max(1, made.high // part) for part in (4, 2, 1)})
            found += [planner.grid(count, size, length) for size in prompts for length in outputs]
    return found


def _trace(path: Path | None) -> list[float]:
    """Moments in seconds, one a line."""
    if path is None:
        return []
    try:
        moments = [float(line) for line in path.read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a list of moments in seconds ({error})") from None
    strange = [moment for moment in moments if not math.isfinite(moment)]
    if strange or not moments:
        raise InputError(
            f"{path}: {f'{strange[0]} is no moment' if strange else 'it holds no moments'}; write seconds, one a line"
        )
    return moments


def check_output(output: Path | None, has_pages: bool) -> None:
    """Make the folder of `output`. Raises InputError where no record can be written."""
    if output is None:
        return
    if output.is_dir():
        raise InputError(f"{output}: is a folder; name a file in it, such as {output / 'record.json'}")
    if has_pages and output.suffix.lower() in (".md", ".csv", ".html"):
        named = output.with_suffix(".json")
        raise InputError(f"{output}: the record is JSON, and {output.suffix} is written beside it; name it {named}")
    output.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(output.parent, os.W_OK):
        raise InputError(f"{output.parent}: this folder cannot be written to; choose another one for --output")


@click.command("compare")
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
def compare_records(before: Path, after: Path) -> None:
    """Say what changed from the record BEFORE to the record AFTER, with 95 % intervals."""
    from benchmarks.suite.regression_gate import compare, read_record

    for line in compare(read_record(before), read_record(after)):
        click.echo(line)


@click.command("selftest")
def selftest() -> None:
    """Measure a server of known latency, and end with code 1 unless every figure is within 1 %."""
    from benchmarks.suite.selfcheck.selftest import run_selftest, table

    for line in table(run_selftest(lambda line: click.echo(line, err=True))):
        click.echo(line)


@click.command("gate")
@click.argument("record", type=click.Path(path_type=Path))
@click.option("--budget", "budgets", multiple=True, metavar="TEXT",
              help="Such as 'p99_inter_token_ms<=30'; repeatable.")  # fmt: skip
@click.option("--baseline", type=click.Path(path_type=Path), metavar="FILE",
              help="An earlier record of the same scenarios: nothing may be worse, beyond the noise.")  # fmt: skip
@click.option("--allow", type=Number(0, 1000), default=5.0, show_default=True, metavar="PERCENT",
              help="How much worse than the baseline a figure may be.")  # fmt: skip
def gate(record: Path, budgets: tuple[str, ...], baseline: Path | None, allow: float) -> None:
    """End with code 1 if any target in RECORD does not keep a budget, or is worse than in the baseline."""
    from benchmarks.suite.regression_gate import check_baseline, check_budgets, read_record

    if not budgets and baseline is None:
        raise InputError("there is nothing to hold the record to; pass --budget, --baseline or both")
    read = read_record(record)
    earlier = read_record(baseline) if baseline is not None else None
    lines = check_budgets(read, list(budgets))
    for line in [*lines, *(check_baseline(read, earlier, allow / 100) if earlier is not None else ())]:
        click.echo(line)
