"""The help of every command in the tree: each option has a sentence, and no placeholder of a library is left in it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import pytest

from serving.cli import COMMANDS, cli

# What click prints for a range without a bound, a default that is unset, or a type that has no name of its own.
LEFTOVERS = re.compile(r"<=?None|None<|\bNone\b|INTEGER RANGE|FLOAT RANGE|\bRANGE\b|Sentinel|UNSET|<class|object at 0x")


def walk(command: click.Command, context: click.Context) -> Iterator[tuple[str, click.Command, click.Context]]:
    """Each command of the tree with its path and its context."""
    yield context.command_path, command, context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None, name
            yield from walk(found, click.Context(found, info_name=name, parent=context))


TREE = {path: (command, context) for path, command, context in walk(cli, click.Context(cli, info_name="gpt2-bundle"))}


def test_the_tree_has_every_command_and_those_below_them():
    assert {path.split()[1] for path in TREE if " " in path} == set(COMMANDS)
    assert "gpt2-bundle bench run" in TREE and "gpt2-bundle client generate" in TREE


@pytest.mark.parametrize("path", TREE)
def test_help_has_no_leftovers(path):
    command, context = TREE[path]
    text = command.get_help(context)
    assert (command.help or "").strip(), "a command without a sentence"
    found = [line.strip() for line in text.splitlines() if LEFTOVERS.search(line)]
    assert not found, f"leftovers in the help of {path}: {found}"


@pytest.mark.parametrize("path", TREE)
def test_every_option_has_a_sentence(path):
    command, _ = TREE[path]
    options = [each for each in command.params if isinstance(each, click.Option) and not each.hidden]
    empty = [each.opts[0] for each in options if not (each.help or "").strip() and each.name != "help"]
    assert not empty, f"options of {path} without help: {empty}"
