"""`gpt2-bundle sign` and `verify-signature`: OpenSSF Model Signing with a local key."""

from __future__ import annotations

from pathlib import Path

import click

from serving.commands.param_types import BundlePath

_KEY = click.Path(exists=True, dir_okay=False, path_type=Path)
_SIGNATURE = click.option(
    "--signature", type=click.Path(path_type=Path), metavar="FILE",
    help="Signature file, outside the bundle.  [default: BUNDLE.sig next to the bundle]",
)  # fmt: skip


@click.command()
@click.argument("bundle", type=BundlePath())
@click.option("--key", required=True, type=_KEY, metavar="FILE",
              help="Private elliptic-curve key in PEM form; its password is GPT2_BUNDLE_KEY_PASSWORD.")  # fmt: skip
@_SIGNATURE
def sign(bundle: Path, key: Path, signature: Path | None) -> None:
    """Sign every file of BUNDLE with a private key.

    The signature is a file next to the bundle, which itself does not change. An older signature there is replaced.
    """
    from serving.bundle import open_bundle
    from serving.distribution.destination import refuse_inside
    from serving.distribution.signature import sign_bundle

    opened = open_bundle(bundle)
    place = signature or _beside(bundle)
    refuse_inside(opened, place)
    click.echo(f"signed {opened.manifest.name}: {sign_bundle(opened, key, place)}")


@click.command()
@click.argument("bundle", type=BundlePath())
@click.option("--key", required=True, type=_KEY, metavar="FILE", help="Public key of the signer in PEM form.")
@_SIGNATURE
def verify_signature(bundle: Path, key: Path, signature: Path | None) -> None:
    """Check that BUNDLE is, byte for byte, what the owner of a key signed."""
    from serving.bundle import open_bundle
    from serving.distribution.signature import verify_signature as check

    opened = open_bundle(bundle)
    check(opened, key, signature or _beside(bundle))
    click.echo(f"the signature of {opened.manifest.name} holds: {len(opened.manifest.artifacts) + 1} files")


def _beside(bundle: Path) -> Path:
    folder = bundle.resolve()
    return folder.with_name(f"{folder.name}.sig")
