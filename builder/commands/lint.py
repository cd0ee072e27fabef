"""`gpt2-bundle lint`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import click

from serving.commands.param_types import Number
from serving.support.json_line import json_line


def _size(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    from builder.tf_export.lint_costs import parse_size

    try:
        return None if value is None else parse_size(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a size such as 16GiB or 80GB") from None


@click.command()
@click.argument("folder", metavar="SAVEDMODEL|BUNDLE|DEPLOYMENT", type=click.Path(path_type=Path))
@click.option("--ms-per-token", type=Number(min=0, min_open=True), metavar="MS",
              help="Milliseconds a token on the machine that will serve; measured here by default.")  # fmt: skip
@click.option("--no-measure", is_flag=True, help="Run nothing; the worst case then needs --ms-per-token.")
@click.option("--context", type=click.IntRange(min=1), metavar="N",
              help="Tokens of the longest generation; a bundle's context by default.")  # fmt: skip
@click.option("--rest-timeout", type=Number(min=0, min_open=True), default=30.0, show_default=True,
              metavar="SECONDS", help="The server's --rest_api_timeout_in_ms, in seconds.")  # fmt: skip
@click.option("--gpu-memory", callback=_size, metavar="SIZE", help="Refuse what needs more, such as 16GiB.")
@click.option("--batch", type=click.IntRange(min=1), metavar="N",
              help="Rows of the largest batch; by default what the batching parameters next to it allow.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def lint(
    folder: Path,
    ms_per_token: float | None,
    no_measure: bool,
    context: int | None,
    rest_timeout: float,
    gpu_memory: int | None,
    batch: int | None,
    as_json: bool,
) -> None:
    """Check whether stock TensorFlow Serving can serve a SavedModel, a bundle's, a deployment's or anyone's.

    Looks for ops that open files or run foreign code, or that the server does not link, tensors without names or ranks,
    requests that cannot be merged, padding that changes answers, batching by the server, generations longer than the
    REST timeout, and too much memory. Exit code 1 on errors; warnings and notes do not fail. A longest generation over
    the REST timeout is a warning, a single token over it an error. A SavedModel with ops that no export of this project
    has is not run.
    """
    from builder.tf_export.lint import find_target, refuse_errors
    from builder.tf_export.lint import lint as find

    target = find_target(folder)
    findings = find(
        target,
        ms_per_token=ms_per_token,
        run=not no_measure,
        context=context,
        timeout=rest_timeout,
        budget=gpu_memory,
        batch=batch,
    )
    counts = Counter(finding.level for finding in findings)
    if as_json:
        record = {"savedmodel": str(target.version), "errors": counts["error"], "warnings": counts["warning"],
                  "findings": [dataclasses.asdict(finding) for finding in findings]}  # fmt: skip
        click.echo(json_line(record))
    else:
        for finding in findings:
            click.echo(f"{finding.level:<8} {finding.check:<11} {finding.where}: {finding.message}")
        click.echo(f"{counts['error']} errors, {counts['warning']} warnings in {target.version}")
    refuse_errors(target.version, findings)
