"""`gpt2-bundle completion`: the script by which a shell asks this command for completions."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the script that completes commands, options, bundles and graphs in SHELL.

    \b
    bash   eval "$(gpt2-bundle completion bash)"                                        in ~/.bashrc
    zsh    eval "$(gpt2-bundle completion zsh)"                                         in ~/.zshrc, after compinit
    fish   gpt2-bundle completion fish > ~/.config/fish/completions/gpt2-bundle.fish    once
    """
    script = get_completion_class(shell)
    assert script is not None, shell
    # Its class also asks bash for its version, which only matters where the script runs.
    values = {"complete_func": "_gpt2_bundle_completion", "complete_var": "_GPT2_BUNDLE_COMPLETE"}
    click.echo(script.source_template % {**values, "prog_name": "gpt2-bundle"})
