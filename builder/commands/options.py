"""The options that every builder command takes, and what they make: a recipe and its run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --recipe, --set, --base, --corpus and --runs to a command."""
    options = [
        click.option(
            "--recipe",
            "recipe_path",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="TOML recipe; the default one makes gpt2-docs from Python's docstrings.",
        ),
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key; repeatable."
        ),
        click.option(
            "--base",
            metavar="NAME",
            help="GPT-2 to fine-tune: a hub name, or the folder of a Hugging Face or OpenAI model, a bundle or a run "
            "(short for --set model.base=NAME).",
        ),
        click.option(
            "--corpus",
            "corpus",
            multiple=True,
            metavar="PATH",
            help="File, folder or glob to read; repeatable (short for corpus.paths).",
        ),
        click.option(
            "--runs",
            default="runs",
            show_default=True,
            type=click.Path(path_type=Path),
            metavar="FOLDER",
            help="Where stages keep their work.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def make_run(
    recipe_path: Path | None, overrides: tuple[str, ...], base: str | None, corpus: tuple[str, ...], runs: Path
) -> Any:
    """Return the pipeline `Run` that the options describe. Raises InputError for what a recipe refuses."""
    import json

    from builder.recipe_reader import read_recipe
    from builder.stages.run_keys import Run

    more = list(overrides)
    if base is not None:
        more.append(f"model.base={json.dumps(base)}")
    if corpus:
        more.append(f"corpus.paths={json.dumps(list(corpus))}")
    recipe = read_recipe(recipe_path, more)
    return Run(recipe, runs / recipe.name)
