"""`python -m benchmarks.training`: trainers in turns, a line of samples for each run, and a record of all."""

from __future__ import annotations

import json
import os
import statistics
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from benchmarks.common.hardware import environment
from benchmarks.common.standalone import OUTPUT, finish, run, say
from benchmarks.common.statistics import summarise
from benchmarks.training.trainers import CASES, LOSS, SPEED, Trainers

SAMPLES = "samples.jsonl"
# Steps of a run that are not counted: the first compiles, and a compiler may have a second go at the second.
WARM_UP = 2


@click.command()
@click.option("--peers", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="PYTHON",
              help="Python of the environment with torch, transformers and KerasHub.")  # fmt: skip
@click.option("--work", default="runs/bench-training", show_default=True, type=click.Path(path_type=Path),
              metavar="FOLDER", help="Tokens, jobs and samples; rounds that are in it are not run again.")  # fmt: skip
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)), help="Repeatable; all by default.")
@click.option("--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="Turns of each trainer.")
@click.option("--cores", type=click.IntRange(1, 1024), default=2, show_default=True, help="Cores that all may use.")
@OUTPUT
def main(peers: Path, work: Path, cases: tuple[str, ...], rounds: int, cores: int, output: Path | None) -> None:
    """Train the same GPT-2 on the same tokens by gpt2-bundle, torch and KerasHub, on the CPU, in turns."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    trainers = Trainers(work, peers, say)
    for case in cases or tuple(CASES):
        _turns(trainers, case, 1 if CASES[case].validate else rounds)
    finish({"environment": environment(), "warm_up_steps": WARM_UP, **summary(read_samples(work))}, output, table)


def _turns(trainers: Trainers, case: str, rounds: int) -> None:
    """Run what is missing of the rounds; each begins with another trainer."""
    done = {(sample["round"], sample["trainer"]) for sample in read_samples(trainers.work) if sample["case"] == case}
    names = LOSS if CASES[case].validate else SPEED
    missing = [
        (turn, name)
        for turn in range(rounds)
        for name in names[turn % len(names) :] + names[: turn % len(names)]
        if (turn, name) not in done
    ]
    if not missing:
        return
    job = trainers.prepare(case)
    for turn, name in missing:
        sample = {"case": case, "round": turn, "trainer": name, **trainers.run(case, job, name)}
        with (trainers.work / SAMPLES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(sample) + "\n")


def read_samples(work: Path) -> list[dict[str, Any]]:
    """What the runs so far gave, one dictionary a run; none where there is no file."""
    path = work / SAMPLES
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def summary(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of step times and tokens/s by case and trainer, validation losses, and versions.

    `ratio` is our XLA run's tokens/s over the trainer's, the median over the rounds that both ran.
    """
    seconds: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    medians: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    versions: dict[str, str] = {}
    losses: dict[str, dict[str, float]] = defaultdict(dict)
    for sample in samples:
        key = sample["case"], sample["trainer"]
        versions |= sample["versions"]
        if sample["validation_loss"] is not None:
            losses[sample["case"]][sample["trainer"]] = sample["validation_loss"]
            continue
        seconds[key].append(sample["seconds"])
        medians[key][sample["round"]] = statistics.median(sample["seconds"][WARM_UP:])
    rows: list[dict[str, Any]] = []
    for (case, name), runs in seconds.items():
        step = summarise([value for run in runs for value in run[WARM_UP:]])
        assert step is not None
        tokens = CASES[case].batch_size * CASES[case].sequence_length
        ours = medians.get((case, SPEED[0]), {})
        shared = [value / ours[turn] for turn, value in medians[case, name].items() if turn in ours]
        rows.append(
            {
                "case": case,
                "trainer": name,
                "step_seconds": asdict(step),
                "tokens_per_second": tokens / step.median,
                "tokens_per_second_interval": [tokens / step.high, tokens / step.low],
                "median_step_seconds_by_round": [medians[case, name][turn] for turn in sorted(medians[case, name])],
                "ratio": statistics.median(shared) if shared else None,
                "first_step_seconds": statistics.median(run[0] for run in runs),
            }
        )
    rows.sort(key=lambda row: (row["case"], -row["tokens_per_second"]))
    return {
        "cases": {name: asdict(case) for name, case in CASES.items()},
        "versions": versions,
        "rows": rows,
        "validation_losses": losses,
    }


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table and a line for each comparison of losses."""
    lines = [
        "| case | trainer | tokens/s (95 %) | step, ms | ours is times as fast | first step, s |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        low, high = row["tokens_per_second_interval"]
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(
            f"| {row['case']} | {row['trainer']} | {row['tokens_per_second']:,.0f} ({low:,.0f} to {high:,.0f}) "
            f"| {row['step_seconds']['median'] * 1e3:,.0f} | {ratio} | {row['first_step_seconds']:.1f} |"
        )
    for case, losses in record["validation_losses"].items():
        told = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        lines.append(f"\n{case}: validation loss, nats a token: {told}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
