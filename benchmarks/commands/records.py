"""`gpt2-bundle bench compare`, `gate` and `selftest`."""

from __future__ import annotations

from pathlib import Path

import click

from serving.commands.param_types import Number
from serving.errors import InputError


@click.command("compare")
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
def compare_records(before: Path, after: Path) -> None:
    """Print what changed from the record BEFORE to the record AFTER, with 95 % intervals."""
    from benchmarks.suite.record import read_record
    from benchmarks.suite.regression_gate import compare

    for line in compare(read_record(before), read_record(after)):
        click.echo(line)


@click.command("selftest")
def selftest() -> None:
    """Measure a server of known latency; exit code 1 unless every figure is within 1 %."""
    from benchmarks.suite.selfcheck.selftest import run_selftest, table

    for line in table(run_selftest(lambda line: click.echo(line, err=True))):
        click.echo(line)


@click.command("gate")
@click.argument("record", type=click.Path(path_type=Path))
@click.option("--budget", "budgets", multiple=True, metavar="TEXT",
              help="Require this of each row's median, such as 'p99_inter_token_ms<=30'; repeatable.")  # fmt: skip
@click.option("--baseline", type=click.Path(path_type=Path), metavar="FILE",
              help="An earlier record of the same scenarios: nothing may be worse, beyond the noise.")  # fmt: skip
@click.option("--allow", type=Number(0, 1000), default=5.0, show_default=True, metavar="PERCENT",
              help="Allow a figure to be this much worse than in the baseline.")  # fmt: skip
def gate(record: Path, budgets: tuple[str, ...], baseline: Path | None, allow: float) -> None:
    """Exit with code 1 if a target in RECORD breaks a budget or is worse than in the baseline."""
    from benchmarks.suite.record import read_record
    from benchmarks.suite.regression_gate import check_baseline, check_budgets

    if not budgets and baseline is None:
        raise InputError("there is nothing to hold the record to; pass --budget, --baseline or both")
    read = read_record(record)
    earlier = read_record(baseline) if baseline is not None else None
    lines = check_budgets(read, list(budgets))
    for line in [*lines, *(check_baseline(read, earlier, allow / 100) if earlier is not None else ())]:
        click.echo(line)
