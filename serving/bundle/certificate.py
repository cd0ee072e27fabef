"""What the bundle's certificate says about graphs of lower precision. Standard library only."""

from __future__ import annotations

from serving.bundle.folder import Bundle
from serving.bundle.strict_json import MAX_BYTES, loads
from serving.errors import BundleError

CERTIFICATE = "verification.json"
VERIFIED, TOO_FEW = "verified", "too few tokens"


def variant_statuses(bundle: Bundle) -> dict[str, str]:
    """The status of each graph that is not float32, by name; empty for a bundle without a certificate.

    A graph missed its gate, or was not compared, if it is not among them.
    """
    try:
        certificate = loads(bundle.read(CERTIFICATE, MAX_BYTES), str(bundle.folder / CERTIFICATE))
        statuses = {name: table.get("status") for name, table in certificate["variants"].items()}
    except (BundleError, TypeError, KeyError, AttributeError):
        return {}
    return {name: status for name, status in statuses.items() if status in (VERIFIED, TOO_FEW)}
