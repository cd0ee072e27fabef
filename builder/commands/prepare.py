"""`gpt2-bundle prepare`."""

from __future__ import annotations

from typing import Any

import click

from builder.commands.options import make_run, recipe_options


@click.command()
@recipe_options
def prepare(**options: Any) -> None:
    """Read the recipe's text, make its tokenizer, and write token shards."""
    run = make_run(**options)

    from builder.build import prepare_stage
    from builder.progress import Reporter
    from builder.workspace import locked

    with locked(run.folder):
        prepare_stage(run, Reporter())
