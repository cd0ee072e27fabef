"""Commands that run as programs of their own, `python -m benchmarks.NAME`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from benchmarks.common.hardware import environment
from serving.bundle import open_bundle
from serving.errors import GPT2BundleError, InputError

_HELP = {
    "clients": "Streaming clients; several numbers with commas where it has such a default.",
    "long_prompt": "Tokens of the arriving prompt.",
    "masks": "Masks of each grammar.",
    "most": "Prompts of each file, the first ones.",
    "new_tokens": "New tokens of each request.",
    "prompt_tokens": "Length of each prompt.",
    "repeats": "Number of rounds.",
    "replicas": "Numbers of replicas.",
    "requests": "Number of requests of each batch.",
    "seconds": "Length of each round.",
    "slots": "Sequences that a replica decodes at once.",
    "streams": "Streams that run at once; several numbers with commas where it has such a default.",
}
OUTPUT = click.option(
    "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the record as JSON to FILE."
)
Decorator = Callable[[Any], Any]


def run(main: Callable[[], Any]) -> None:
    """Run `main`; an error that the user can mend is one line and an exit code, as those of `gpt2-bundle` are."""
    try:
        main()
    except GPT2BundleError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


def measurement(
    *options: Decorator,
    graph: str | None = "ort/int8",
    table: Callable[[dict[str, Any]], str] | None = None,
    **numbers: float | str,
) -> Callable[[Callable[..., Mapping[str, Any]]], click.Command]:
    """Make a command of a function from an open bundle and options to what it measured.

    The command takes BUNDLE, `--graph` with a default unless that is None, an option with a default for each of
    `numbers`, and the function's own `options`. The record is the machine, the options, and what the function returns;
    it is printed, or its `table` is, and goes to `--output`. Default lengths of prompt and answer are lowered to what
    the model's context holds.
    """

    def decorate(measure: Callable[..., Mapping[str, Any]]) -> click.Command:
        def main(bundle: Path, output: Path | None, **given: Any) -> None:
            opened = open_bundle(bundle, check="sizes")
            _fit_lengths(given, opened.manifest.model.n_positions)
            record = {"bundle": opened.manifest.name, "environment": environment(), **given}
            finish(record | dict(measure(opened, **given)), output, table)

        command: Any = main
        for decorator in reversed(options):
            command = decorator(command)
        for name, default in reversed(numbers.items()):
            flag = f"--{name.replace('_', '-')}"
            command = click.option(flag, default=default, show_default=True, help=_HELP[name])(command)
        if graph is not None:
            command = click.option("--graph", default=graph, show_default=True, help="Graph of the bundle to run.")(
                command
            )
        bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
        return click.command(help=measure.__doc__)(bundle_argument(OUTPUT(command)))

    return decorate


def _fit_lengths(given: dict[str, Any], context: int) -> None:
    """Halve the context between prompt and answer if their default lengths exceed it. Raises InputError for others."""
    if "prompt_tokens" not in given or "new_tokens" not in given:
        return
    if given["prompt_tokens"] + given["new_tokens"] <= context:
        return
    source = click.get_current_context().get_parameter_source
    if any(source(name) is not ParameterSource.DEFAULT for name in ("prompt_tokens", "new_tokens")):
        raise InputError(
            f"--prompt-tokens {given['prompt_tokens']} and --new-tokens {given['new_tokens']} do not fit into the "
            f"model's context of {context} tokens; ask for less"
        )
    given |= {"prompt_tokens": context // 2, "new_tokens": context // 2}
    say(f"the model's context is {context} tokens: prompts of {context // 2}, answers of {context // 2}")


def finish(record: dict[str, Any], output: Path | None, table: Callable[[dict[str, Any]], str] | None = None) -> None:
    """Write the record to `output`, and print its table; the record itself where there is neither."""
    text = json.dumps(record, indent=1, default=str)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", encoding="utf-8")
    if table is not None:
        click.echo(table(record))
    elif output is None:
        click.echo(text)


def numbers_of(text: str) -> list[int]:
    """The numbers of an option such as "1,4,16"."""
    return [int(each) for each in text.split(",")]


def say(told: Any) -> None:
    """Print progress to standard error: a line, or a value as JSON."""
    click.echo(told if isinstance(told, str) else json.dumps(told), err=True)
