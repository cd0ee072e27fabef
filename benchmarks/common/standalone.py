"""Commands that run as programs of their own, `python -m benchmarks.NAME`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from serving.errors import GPT2BundleError


def run(main: Callable[[], Any]) -> None:
    """Run `main`; an error that the user can mend is one line and an exit code, as those of `gpt2-bundle` are."""
    try:
        main()
    except GPT2BundleError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
