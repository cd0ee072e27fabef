"""`gpt2-bundle man`: the manual page, from the tree of commands."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import click

from serving import __version__

# Signs as a terminal shows them, from groff_char(7).
_SIGNS = str.maketrans({"\\": r"\e", "-": r"\-", '"': r"\(dq", "'": r"\(aq", "`": r"\(ga", "^": r"\(ha", "~": r"\(ti"})


@click.command()
@click.pass_context
def man(ctx: click.Context) -> None:
    """Print the manual page in roff.

    An installation puts it where 'man gpt2-bundle' finds it.
    """
    click.echo("\n".join(manual(ctx.find_root().command)))


def manual(root: click.Command) -> Iterator[str]:
    """The lines of the page: a section for each command below `root`, a paragraph for each option. See man(7)."""
    name = "gpt2-bundle"
    yield '.\\" Written by "gpt2-bundle man".'
    yield f'.TH GPT2-BUNDLE 1 "" "{name} {__version__}" "User commands"'
    yield f".SH NAME\n{_text(name)} \\- {_text('GPT-2 from text to a verified bundle')}"
    yield f".SH SYNOPSIS\n.B {_text(name)}\n.I COMMAND\n.RI [ OPTIONS ]"
    yield f".SH DESCRIPTION\n{_text(root.help or '')}"
    yield ".SH COMMANDS"
    yield from _commands(root, click.Context(root, info_name=name))
    yield (
        ".SH EXIT STATUS\n.TP\n0\nThe command succeeded.\n.TP\n1\nIt failed; one line on standard error says why.\n"
        ".TP\n2\nThe command line or its input is wrong.\n.TP\n130\nIt was interrupted."
    )
    yield (
        ".SH ENVIRONMENT\n.TP\nGPT2_BUNDLE_TRACEBACK\n1 prints the traceback of an error.\n.TP\n"
        "GPT2_BUNDLE_KEY_PASSWORD\nPassword of the key of sign."
    )


def _commands(group: click.Command, parent: click.Context) -> Iterator[str]:
    for name in group.list_commands(parent) if isinstance(group, click.Group) else ():
        command = group.get_command(parent, name) if isinstance(group, click.Group) else None
        assert command is not None, name
        context = click.Context(command, info_name=name, parent=parent)
        usage = " ".join(command.collect_usage_pieces(context))
        yield f'.SS "{_text(context.command_path)} {_text(usage)}"'
        # The first paragraph follows its heading without a request of its own.
        yield "\n".join(_paragraphs(inspect.cleandoc(command.help or ""))).removeprefix(".PP\n")
        for option in command.params:
            record = option.get_help_record(context)
            if isinstance(option, click.Option) and record and "--help" not in option.opts:
                yield f".TP\n.B {_text(record[0])}\n{_text(record[1])}"
        yield from _commands(command, context)


def _paragraphs(text: str) -> Iterator[str]:
    """A help text; a paragraph after a line \\b keeps its lines, as in click."""
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.splitlines()
        if lines and lines[0] == "\b":
            yield ".PP\n.nf\n" + "\n".join(map(_text, lines[1:])) + "\n.fi"
        elif lines:
            yield f".PP\n{_text(' '.join(line.strip() for line in lines))}"


def _text(text: str) -> str:
    """`text` as roff shows it: signs of the typewriter kept, nothing read as a request. See groff_char(7)."""
    text = text.translate(_SIGNS)
    return f"\\&{text}" if text.startswith(".") else text
