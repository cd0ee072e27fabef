"""`gpt2-bundle deploy`: a folder that a server runs from."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click

from serving.commands.param_types import Number
from serving.deploy.tf_serving import IMAGE_VERSION


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", type=click.Choice(["tfserving"]), required=True, help="The server.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Where it goes.  [default: deploy/NAME-tfserving]")  # fmt: skip
@click.option("--image-version", default=IMAGE_VERSION, show_default=True, metavar="TAG",
              help="Tag of tensorflow/serving.")  # fmt: skip
@click.option("--rest-timeout", type=Number(min=0.001, max=86_400), default=30.0, show_default=True,
              metavar="SECONDS", help="After which the server ends a REST request.")  # fmt: skip
@click.option("--no-copy", is_flag=True, help="Mount the SavedModel from the bundle instead of copying it.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def deploy(
    bundle: Path,
    target: str,
    output: Path | None,
    image_version: str,
    rest_timeout: float,
    no_copy: bool,
    as_json: bool,
) -> None:
    """Write a folder that serves BUNDLE: by docker compose, on CPU or GPU, or by the server's binary.

    A deployment that is there already is replaced in one step; any other folder with files in it is refused.
    """
    from serving.bundle import open_bundle
    from serving.deploy.tf_serving import write_tf_serving

    opened = open_bundle(bundle)
    destination = output or Path("deploy") / f"{opened.manifest.name}-{target}"
    folder = write_tf_serving(opened, destination, version=image_version, rest_timeout=rest_timeout, copy=not no_copy)
    if as_json:
        click.echo(json.dumps({"folder": str(folder), "target": target, "name": opened.manifest.name}))
    else:
        click.echo(f"wrote {folder}; start it with: cd {shlex.quote(str(folder))} && docker compose up (or ./run.sh)")
