"""`gpt2-bundle recipe`."""

from __future__ import annotations

import dataclasses

import click

from serving.support.json_line import json_line


@click.command()
@click.argument("key", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def recipe(key: str | None, as_json: bool) -> None:
    """Print the keys of a recipe with their types, defaults and meanings.

    KEY is a key such as training.epochs, or a section such as training. Without KEY, all keys are printed.
    """
    from builder.recipe_reference import find_keys, recipe_keys

    keys = list(recipe_keys()) if key is None else find_keys(key)
    if as_json:
        click.echo(json_line([dataclasses.asdict(each) for each in keys]))
        return
    for each in keys:
        click.echo(f"{each.name}: {each.type}, default {each.shown_default}")
        click.echo(f"    {each.meaning}" + (f" ({each.values})" if each.values else ""))
