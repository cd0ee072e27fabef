"""The command line's options for sampling, made from the declarations of the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from serving.commands.param_types import Seed
from serving.sampling import DECLARATIONS

_TYPES = {"integer": int, "number": float}


def sampling_options(slots_only: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that gives a command an option for each sampling parameter, the text and token lists included.

    With `slots_only`, those alone that the slots of a SavedModel have.
    """
    needs = "; needs a server with streams" if slots_only else ""
    options = [
        click.option(each.option, is_flag=True, help=f"{each.help}  [default: end there]")
        if each.kind == "boolean"
        else click.option(
            each.option,
            type=Seed() if each.name == "seed" else _TYPES[each.kind],
            default=each.default,
            show_default=True,
            help=each.help,
        )
        for each in DECLARATIONS.values()
        if each.slots or not slots_only
    ]
    if not slots_only:
        options.append(
            click.option(
                "--logit-bias",
                multiple=True,
                metavar="ID=VALUE",
                help="Add VALUE to the logit of the token ID. May be repeated.  [default: none]",
            )
        )
    options += [
        click.option(
            "--stop",
            multiple=True,
            metavar="TEXT",
            help=f"End the output before this text{needs}. May be repeated.  [default: none]",
        ),
        click.option(
            "--stop-token-id",
            "stop_token_ids",
            type=int,
            multiple=True,
            metavar="ID",
            help=f"End the output after this token{needs}. May be repeated.  [default: none]",
        ),
    ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate
