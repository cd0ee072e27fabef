"""`gpt2-bundle prepare`."""

from __future__ import annotations

from typing import Any

import click

from builder.commands.options import make_run, recipe_options


@click.command()
@recipe_options
@click.option("--workers", type=click.IntRange(1, 256), help="Processes that clean and compare texts; one a core by "
              "default. The result is the same for any number.")  # fmt: skip
def prepare(workers: int | None, **options: Any) -> None:
    """Read the recipe's text, make its tokenizer, and write token shards."""
    run = make_run(**options)

    from builder.progress import Reporter
    from builder.run_folder import locked
    from builder.stages.pipeline import prepare_stage

    with locked(run.folder):
        prepare_stage(run, Reporter(), workers or 0)
