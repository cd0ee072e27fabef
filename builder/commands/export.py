"""`gpt2-bundle export`."""

from __future__ import annotations

from typing import Any

import click

from builder.commands.options import make_run, recipe_options


@click.command()
@recipe_options
def export(**options: Any) -> None:
    """Export the trained model to a draft bundle: SavedModel, portable and optimized ONNX."""
    run = make_run(**options)

    from builder.progress import Reporter
    from builder.run_folder import locked
    from builder.stages.pipeline import as_prepared, export_stage

    reporter = Reporter()
    with locked(run.folder):
        export_stage(as_prepared(run, reporter), reporter)
