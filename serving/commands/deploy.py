"""`gpt2-bundle deploy`: a folder that a server runs from."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from serving.commands.param_types import Number
from serving.deploy.tf_serving import IMAGE_VERSION, KEEP, Deployed
from serving.deploy.tf_serving_config import POLL_SECONDS, THREADS, ServerOptions
from serving.support.json_line import json_line


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--target", type=click.Choice(["tfserving"]), required=True, help="Write a folder for this server; required."
)
@click.option("--output", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Write the deployment to this folder.  [default: deploy/NAME-tfserving]")  # fmt: skip
@click.option("--image-version", default=IMAGE_VERSION, show_default=True, metavar="TAG",
              help="Use this tag of the image tensorflow/serving.")  # fmt: skip
@click.option("--rest-timeout", type=Number(min=0.001, max=86_400), default=30.0, show_default=True,
              metavar="SECONDS", help="Maximum time of a REST request on the server.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1, 4096), default=THREADS, show_default=True,
              help="Number of server threads, for REST and for gRPC each. A thread works on one request.")  # fmt: skip
@click.option("--keep-versions", type=click.IntRange(min=1), default=KEEP, show_default=True, metavar="N",
              help="Number of model versions to keep in the folder; older ones are removed.")  # fmt: skip
@click.option("--server-batching", is_flag=True,
              help="Let the server merge requests; config/batching_parameters.txt names the risks.  "
                   "[default: no merging]")  # fmt: skip
@click.option("--no-copy", is_flag=True, help="Mount the SavedModel from the bundle.  [default: copy it]")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.  [default: text]")
def deploy(
    bundle: Path,
    target: str,
    output: Path | None,
    image_version: str,
    rest_timeout: float,
    threads: int,
    keep_versions: int,
    server_batching: bool,
    no_copy: bool,
    as_json: bool,
) -> None:
    """Write a folder that serves BUNDLE: by docker compose, on CPU or GPU, or by the server's binary.

    A deployment of the same model in the folder gets the SavedModel as its next version, which a running server loads.
    Any other folder with files in it is refused.
    """
    from serving.bundle import open_bundle
    from serving.deploy.tf_serving import write_tf_serving

    opened = open_bundle(bundle)
    destination = output or Path("deploy") / f"{opened.manifest.name}-{target}"
    fresh = not (destination / "deployment.json").exists()
    options = ServerOptions(rest_timeout, threads, server_batching)
    done = write_tf_serving(
        opened, destination, options, image_version=image_version, copy=not no_copy, keep=keep_versions
    )
    if as_json:
        record = {"folder": str(done.folder), "target": target, "name": opened.manifest.name, "version": done.version,
                  "added": done.added, "removed": list(done.removed)}  # fmt: skip
        click.echo(json_line(record))
    else:
        click.echo(_said(done, fresh=fresh))


def _said(done: Deployed, *, fresh: bool) -> str:
    place = shlex.quote(str(done.folder))
    start = f"start it with: cd {place} && docker compose up (or ./run.sh)"
    if not done.kept:
        again = "" if fresh else "a server that runs from it must be started again; "
        return f"wrote {done.folder}; {again}{start}"
    gone = f"; removed version {', '.join(map(str, done.removed))}" if done.removed else ""
    if done.added:
        return f"added version {done.version} to {done.folder}; a running server loads it within {POLL_SECONDS} s{gone}"
    same = f"version {done.version} in {done.folder} is this SavedModel already"
    return f"{same}; wrote the configuration, which a server reads when it starts{gone}"
