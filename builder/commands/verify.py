"""`gpt2-bundle verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from builder.commands.options import make_run, recipe_options
from serving.commands.param_types import BundlePath
from serving.errors import InputError
from serving.support.json_line import json_line


@click.command()
@click.argument("bundle", required=False, type=BundlePath())
@recipe_options
@click.option("--json", "as_json", is_flag=True, help="Print the certificate as one line of JSON at the end.")
@click.pass_context
def verify(context: click.Context, /, bundle: Path | None, as_json: bool, **options: Any) -> None:
    """Prove that Keras, the SavedModel and both ONNX graphs say the same.

    With BUNDLE, repeats the certificate of a published bundle on its own golden input and writes nothing. Without,
    verifies the recipe's exported draft and writes verification.json next to it.
    """
    for name in ("base", "corpus", "runs"):
        if bundle is not None and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise InputError(f"--{name} is for a recipe's draft; leave it out, or BUNDLE")
    run = make_run(**options)

    from builder.progress import Reporter
    from builder.run_folder import locked
    from builder.stages.pipeline import as_prepared, open_draft, verify_bundle
    from builder.stages.train import check_quality
    from serving.bundle import open_bundle
    from serving.errors import ParityError

    reporter = Reporter()
    if bundle is not None:
        opened = open_bundle(bundle)
        check_quality(run.recipe.verify, opened.manifest.quality)
        certificate, _ = verify_bundle(opened, run.recipe.verify.batch_size, reporter)
    else:
        with locked(run.folder):
            draft = open_draft(as_prepared(run, reporter))
            check_quality(run.recipe.verify, draft.manifest.quality)
            certificate, _ = verify_bundle(draft, run.recipe.verify.batch_size, reporter)
            path = run.draft.parent / "verification.json"
            path.write_text(json.dumps(certificate, indent=2) + "\n", encoding="utf-8")
            reporter.line(f"wrote {path}")
    if bundle is not None:
        for name, problem in certificate["left_out"].items():
            raise ParityError(f"parity failed in {name}: {problem}")
    for name, record in certificate["greedy"].items():
        table = certificate["runtimes"].get(name)
        detail = f", largest logit difference {table['every_step']['max_abs']:.1e}" if table else ""
        reporter.line(f"{name}: {record['equal']:,} of {record['of']:,} greedy tokens equal{detail}")
    if as_json:
        click.echo(json_line(certificate))
