"""What a benchmark of a bundle runs: its graphs by name, and the bundle's own held-out text."""

from __future__ import annotations

import json
from collections.abc import Sequence

from benchmarks.common.decode_step import Target
from serving.backends.loader import load_backend
from serving.bundle import Bundle
from serving.errors import BundleError, InputError, RuntimeMissingError
from serving.support.suggestions import did_you_mean

SAVEDMODEL = "savedmodel"


def load_targets(bundle: Bundle, names: Sequence[str]) -> list[Target]:
    """Load the named targets, or every one that the bundle has if none is named.

    Raises InputError for a name that the bundle does not have, RuntimeMissingError if its runtime is not installed.
    """
    graphs = bundle.manifest.graphs
    known = [name for name, graph in graphs.items() if graph.runtime == "onnx" and graph.cache != "none"]
    known += [SAVEDMODEL] if "savedmodel/prefill" in graphs else []
    targets = []
    for name in names or known:
        if name not in known:
            raise InputError(f"{bundle.folder}: no target {name!r}{did_you_mean(name, known)}")
        precision = "fp32" if name == SAVEDMODEL else graphs[name].precision
        backend = load_backend(bundle, "tensorflow") if name == SAVEDMODEL else load_backend(bundle, "onnx", name)
        targets.append(Target(name, precision, backend))
    if not targets:
        raise RuntimeMissingError(f"{bundle.folder}: the bundle has no graph that can be measured; build it again")
    return targets


def read_text(bundle: Bundle) -> list[int]:
    """The bundle's held-out text, as token ids, from golden.json."""
    path = bundle.path("golden.json")
    try:
        text = [int(token) for token in json.loads(path.read_text(encoding="utf-8"))["text"]]
        if not text:
            raise ValueError("its text is empty")
    except (ValueError, TypeError, KeyError) as error:
        raise BundleError(f"{path}: not a golden record ({type(error).__name__}: {error}); build it again") from None
    return text
