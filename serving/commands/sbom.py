"""`gpt2-bundle sbom`: the bill of materials of a bundle."""

from __future__ import annotations

import secrets
from pathlib import Path

import click

from serving.commands.param_types import BundlePath
from serving.errors import BundleError


@click.command()
@click.argument("bundle", type=BundlePath())
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Write to this file, outside the bundle.  [default: standard output]")  # fmt: skip
@click.option("--check", "checked", type=click.Path(path_type=Path, dir_okay=False, exists=True), metavar="FILE",
              help="Compare this file with the bundle, and write nothing.")  # fmt: skip
def sbom(bundle: Path, output: Path | None, checked: Path | None) -> None:
    """Write the bill of materials of BUNDLE as CycloneDX 1.6 JSON.

    It lists every file with its hash, the base model, the corpus, package versions and quality, as the manifest has
    them. The same bundle gives the same bytes.
    """
    from serving import __version__
    from serving.bundle import open_bundle
    from serving.bundle.plain_files import read_plain
    from serving.bundle.strict_json import MAX_BYTES
    from serving.distribution.bill_of_materials import bill_of_materials
    from serving.distribution.destination import refuse_inside

    if output and checked:
        raise click.UsageError("--check writes nothing; leave out --output or --check")
    opened = open_bundle(bundle)
    text = bill_of_materials(opened)
    if checked:
        if read_plain(checked, MAX_BYTES) != text.encode():
            raise BundleError(f"{checked}: is not what gpt2-bundle {__version__} writes for {bundle}; one was changed")
        click.echo(f"{checked} is the bill of materials of {opened.manifest.name}")
    elif output:
        refuse_inside(opened, output)
        unfinished = output.with_name(f".{output.name}.{secrets.token_hex(4)}")
        try:
            unfinished.write_text(text, encoding="utf-8")
            unfinished.replace(output)
        finally:
            unfinished.unlink(missing_ok=True)
        click.echo(f"wrote {output}")
    else:
        click.echo(text.encode(), nl=False)
