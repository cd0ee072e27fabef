"""The contract between builder and serving, by the standard library alone: what programs import."""

from serving.bundle.folder import (
    MANIFEST_NAME,
    TOKENIZER_FILES,
    TOKENIZER_NAME,
    Artifact,
    Bundle,
    Geometry,
    Graph,
    Manifest,
    Provenance,
    TensorSpec,
    TokenizerFiles,
    from_json,
    open_bundle,
    publish,
    to_json,
    write_manifest,
)

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
