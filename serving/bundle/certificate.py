"""What the bundle's certificate says about graphs of lower precision. Standard library only."""

from __future__ import annotations

from typing import Any

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
        statuses = {name: table.get("status") for name, table in _variants(bundle).items()}
    except AttributeError:
        return {}
    return {name: status for name, status in statuses.items() if status in (VERIFIED, TOO_FEW)}


def prefill_graph_status(bundle: Bundle, graph_name: str) -> tuple[str, str] | None:
    """The graph that the certificate lets read the prompts of `graph_name`, and the status of that proof.

    None where there is no proof: for a bundle without a certificate, or where the pair missed its gate.
    """
    try:
        record = _variants(bundle)[graph_name]["prefill_graph"]
        name, status = record["graph"], record["status"]
    except (KeyError, TypeError):
        return None
    if not isinstance(name, str) or name not in bundle.manifest.graphs or status not in (VERIFIED, TOO_FEW):
        return None
    return name, status


def _variants(bundle: Bundle) -> dict[str, Any]:
    """The certificate's figures of graphs that are not float32; empty where nothing can be read."""
    try:
        variants = loads(bundle.read(CERTIFICATE, MAX_BYTES), str(bundle.folder / CERTIFICATE))["variants"]
    except (BundleError, TypeError, KeyError):
        return {}
    return variants if isinstance(variants, dict) else {}
