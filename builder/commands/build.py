"""`gpt2-bundle build`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from builder.commands.options import make_run, recipe_options
from serving.support.json_line import json_line


@click.command()
@recipe_options
@click.option("--output", default="dist", show_default=True, type=click.Path(path_type=Path), metavar="FOLDER",
              help="Folder that gets the bundle, as FOLDER/NAME.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON at the end.")
def build(output: Path, as_json: bool, **options: Any) -> None:
    """Build a verified bundle from text: prepare, train, export, verify, package.

    If a build is interrupted, run the same command again: it resumes after the last completed step.

    With the environment variable TF_CONFIG, this is one worker of several, and the same command runs in each.
    """
    run = make_run(**options)

    from builder.progress import Reporter
    from builder.run_folder import locked
    from builder.stages.pipeline import build as run_build
    from builder.stages.pipeline import report_lines
    from builder.stages.workers import follow, joined_workers
    from builder.tracking.session import tracked
    from serving.bundle.examples import generate_arguments

    reporter = Reporter()
    with joined_workers(run.recipe, reporter) as workers:
        if workers is not None and not workers.is_chief:
            follow(run, workers, reporter)
            if as_json:
                click.echo(json_line({"bundle": None, "worker": workers.cluster.names[workers.rank]}))
            return
        with locked(run.folder), tracked(run.recipe, run.folder, reporter.line) as tracking:
            bundle = run_build(run, output, reporter, workers, tracking)
    addresses = tracking.addresses(run.export_key()) if run.recipe.tracking.tools else {}
    manifest = bundle.manifest
    if as_json:
        record = {"bundle": str(bundle.folder), "size": manifest.total_size, "quality": manifest.quality,
                  "parity": manifest.parity, "tracking": addresses}  # fmt: skip
        click.echo(json_line(record))
    else:
        for line in report_lines(run, bundle):
            click.echo(line)
        for tool, address in addresses.items():
            click.echo(f"{tool}: {address}")
        arguments = generate_arguments(bundle.folder)
        click.echo(f"try it: gpt2-bundle generate {shlex.quote(str(bundle.folder))} {arguments}")
