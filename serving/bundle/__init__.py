"""The contract between builder and serving, by the standard library alone: what programs import."""

from serving.bundle.folder import TOKENIZER_FILES, Bundle, open_bundle, write_manifest
from serving.bundle.manifest import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Artifact,
    Geometry,
    Graph,
    Manifest,
    Provenance,
    TensorSpec,
    TokenizerFiles,
    from_json,
    to_json,
)
from serving.bundle.publishing import publish

__all__ = [
    "MANIFEST_NAME",
    "TOKENIZER_FILES",
    "TOKENIZER_NAME",
    "Artifact",
    "Bundle",
    "Geometry",
    "Graph",
    "Manifest",
    "Provenance",
    "TensorSpec",
    "TokenizerFiles",
    "from_json",
    "open_bundle",
    "publish",
    "to_json",
    "write_manifest",
]
