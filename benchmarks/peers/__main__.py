"""`python -m benchmarks.peers`: contests one after the other, kept in one record that later calls add to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from benchmarks.common.standalone import run
from benchmarks.peers.contest import OWN, PEERS, PRECISIONS, Contest, Setting, commands
from benchmarks.peers.report import conditions, table
from serving.bundle import open_bundle
from serving.errors import InputError


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--environments", default=".", show_default=True, type=click.Path(path_type=Path), metavar="FOLDER",
              help="Where the peers' environments are: .venv-peer-NAME; peers without one are left out.")  # fmt: skip
@click.option("--peer", "peers", multiple=True, type=click.Choice(list(PEERS)), help="Repeatable; all by default.")
@click.option("--precision", "precisions", multiple=True, type=click.Choice(PRECISIONS), default=PRECISIONS,
              show_default=True, help="Repeatable; contestants of one precision take turns.")  # fmt: skip
@click.option("--batch-size", "batch_sizes", multiple=True, type=click.IntRange(1, 4096), default=(1, 4, 16, 64),
              show_default=True, help="Rows at once; repeatable.")  # fmt: skip
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--new-tokens", type=click.IntRange(1), default=32, show_default=True, help="Decode steps a round.")
@click.option("--repeats", type=click.IntRange(1, 1000), default=3, show_default=True, help="Rounds.")
@click.option("--work", default="runs/bench-peers", show_default=True, type=click.Path(path_type=Path),
              metavar="FOLDER", help="Converted models and the peers' logs.")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE",
              help="The record, as JSON; contests that it holds of other precisions and batch sizes stay.")  # fmt: skip
def main(
    bundle: Path,
    environments: Path,
    peers: tuple[str, ...],
    precisions: tuple[str, ...],
    batch_sizes: tuple[int, ...],
    work: Path,
    output: Path | None,
    **settings: Any,
) -> None:
    """Measure BUNDLE's graphs beside other runtimes on the CPU: decode and prefill, in turns, batch by batch."""
    opened = open_bundle(bundle, check="sizes")
    needed = settings["prompt_tokens"] + settings["new_tokens"] + 1
    if needed > opened.manifest.model.n_positions:
        raise InputError(f"{needed} positions pass the context of {opened.manifest.model.n_positions} tokens")
    record: dict[str, Any] = {"bundle": opened.manifest.name, "contests": []}
    if output is not None and output.exists():
        record = _read(output)
    for batch_size in batch_sizes:
        for precision in precisions:
            found = commands(precision, environments)
            chosen = {name: command for name, command in found.items() if name == OWN or name in (peers or PEERS)}
            contest = Contest(opened, chosen, work, lambda line: click.echo(line, err=True))
            add(record, contest.hold(Setting(precision, batch_size, **settings)))
            if output is not None:
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    click.echo(table(record))
    click.echo()
    click.echo(conditions(record))


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        record["contests"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as a record ({error!r}); name another file") from None
    return record


def add(record: dict[str, Any], contest: dict[str, Any]) -> None:
    """Put a contest into the record, in the place of one of the same precision and batch size."""
    kept = [other for other in record["contests"] if _place(other) != _place(contest)]
    record["contests"] = sorted([*kept, contest], key=_place)


def _place(contest: dict[str, Any]) -> tuple[int, int]:
    return PRECISIONS.index(contest["precision"]), contest["batch_size"]


if __name__ == "__main__":
    run(main)
