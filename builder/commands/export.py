"""`gpt2-bundle export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from builder.commands.options import make_run, recipe_options

_OF_A_BUNDLE = ("bundle", "gguf", "outtype")


@click.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--gguf", type=click.Path(path_type=Path), metavar="FILE",
              help="Write BUNDLE to this GGUF file, for llama.cpp.")  # fmt: skip
@click.option("--outtype", type=click.Choice(["f32", "f16", "q8_0", "q4_0"]), default="f32", show_default=True,
              help="Encode the matrices of the GGUF file in this type; the last two are quantized.")  # fmt: skip
@recipe_options
@click.pass_context
def export(context: click.Context, /, bundle: Path | None, gguf: Path | None, outtype: str, **options: Any) -> None:
    """Export the trained model to a draft bundle: SavedModel, portable and optimized ONNX.

    With BUNDLE and --gguf, write a finished bundle to one file for llama.cpp: weights, tokenizer and chat template.
    The options of a recipe belong to the first form, --outtype to the second.
    """
    given = {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    if not given & set(_OF_A_BUNDLE):
        _export_run(**options)
        return
    if bundle is None or gguf is None:
        raise click.UsageError("a GGUF file needs both: 'gpt2-bundle export BUNDLE --gguf FILE'", context)
    if more := sorted(given - set(_OF_A_BUNDLE)):
        flag = {"recipe_path": "--recipe", "overrides": "--set"}.get(more[0], f"--{more[0]}")
        raise click.UsageError(f"{flag} is for the export of a run, and {bundle} is a finished bundle", context)
    _export_gguf(bundle, gguf, outtype)


def _export_run(**options: Any) -> None:
    run = make_run(**options)

    from builder.progress import Reporter
    from builder.run_folder import locked
    from builder.stages.pipeline import as_prepared, export_stage

    reporter = Reporter()
    with locked(run.folder):
        export_stage(as_prepared(run, reporter), reporter)


def _export_gguf(folder: Path, path: Path, outtype: str) -> None:
    from serving.bundle import open_bundle
    from serving.gguf import write_gguf

    bundle = open_bundle(folder)
    write_gguf(bundle, path, outtype)
    click.echo(f"wrote {path} ({path.stat().st_size:,} bytes, {outtype}) from {bundle.manifest.name}")
