"""`gpt2-bundle train`."""

from __future__ import annotations

from typing import Any

import click

from builder.commands.options import make_run, recipe_options


@click.command()
@recipe_options
@click.option("--loop", type=click.Choice(["fit", "custom"]), help="Whose training loop (short for training.loop).")
def train(loop: str | None, overrides: tuple[str, ...], **options: Any) -> None:
    """Train GPT-2 on the prepared tokens. An interrupted run resumes from its last checkpoint.

    With the environment variable TF_CONFIG, this is one worker of several, and the same command runs in each.
    """
    if loop is not None:
        overrides = (*overrides, f"training.loop={loop}")
    run = make_run(overrides=overrides, **options)

    from builder.progress import Reporter
    from builder.run_folder import locked
    from builder.stages.pipeline import as_prepared, train_stage
    from builder.stages.workers import follow, joined_workers
    from builder.tracking.session import tracked

    reporter = Reporter()
    with joined_workers(run.recipe, reporter) as workers:
        if workers is not None and not workers.is_chief:
            follow(run, workers, reporter)
            return
        with locked(run.folder), tracked(run.recipe, run.folder, reporter.line) as tracking:
            run = as_prepared(run, reporter)
            train_stage(run, reporter, workers, tracking)
    for tool, address in (tracking.addresses(run.export_key()) if run.recipe.tracking.tools else {}).items():
        click.echo(f"{tool}: {address}")
