"""`gpt2-bundle publish`: a bundle to a hub or into an OCI image layout."""

from __future__ import annotations

from pathlib import Path

import click

from serving.commands.param_types import BundlePath
from serving.errors import InputError
from serving.support.json_line import json_line


@click.command()
@click.argument("bundle", type=BundlePath())
@click.argument("destination")
@click.option("--attach", "attached", multiple=True, type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Publish this signature or bill of materials too; may be repeated.")  # fmt: skip
@click.option(
    "--private", is_flag=True, help="Create a missing hub repository as a private one.  [default: the hub's default]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.  [default: text]")
def publish(bundle: Path, destination: str, attached: tuple[Path, ...], private: bool, as_json: bool) -> None:
    """Check BUNDLE and publish it to DESTINATION.

    \b
    hub:ORGANIZATION/NAME   a model repository of the Hugging Face hub
    oci:FOLDER[:TAG]        an OCI image layout on disk, as an artifact that ORAS pushes and pulls

    A repository gets one commit, with the bundle's files and nothing else. The token is HF_TOKEN or that of
    'hf auth login'. A layout keeps its other tags; the default tag is "latest". If interrupted, run the same command
    again: what arrived is not sent or written again.
    """
    from serving.bundle import open_bundle
    from serving.distribution.destination import HubDestination, attachment, destination_of

    place = destination_of(destination)
    if private and not isinstance(place, HubDestination):
        raise InputError("--private is for hub: destinations; leave it out")
    opened = open_bundle(bundle)
    attachments = [attachment(opened, path) for path in attached]
    if isinstance(place, HubDestination):
        from serving.distribution.hub import publish_to_hub

        commit = publish_to_hub(opened, place.repository, attachments, private=private)
        record = {"destination": destination, "url": commit.url, "commit": commit.commit, "changed": commit.changed}
        said = f"published {opened.manifest.name} to {commit.url} as commit {commit.commit}"
        if not commit.changed:
            said = f"{commit.url} holds this bundle already, as commit {commit.commit}"
    else:
        from serving.distribution.oci_layout import write_layout

        done = write_layout(opened, place.folder, place.tag, attachments)
        record = {"destination": destination, "digest": done.digest, "size": done.size, "reused": done.reused}
        said = f"published {opened.manifest.name} to {done.folder} as {done.tag}, {done.digest}"
    click.echo(json_line(record) if as_json else said)
