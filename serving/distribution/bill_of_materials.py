"""The bill of materials of a bundle as CycloneDX 1.6 JSON, from its manifest and nothing else.

The same manifest gives the same bytes, so a document is checked by writing it again. What the manifest does not
record, such as licenses, is left out: the dependency graph is marked as incomplete.
Schema: cyclonedx.org/docs/1.6/json.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from serving import __version__
from serving.bundle import Bundle
from serving.bundle.manifest import MANIFEST_NAME, Artifact, Manifest
from serving.bundle.plain_files import hash_plain
from serving.bundle.strict_json import MAX_BYTES

_CORPUS, _BASE, _MODEL = "corpus", "base-model", "model"


def bill_of_materials(bundle: Bundle) -> str:
    """Return the document's text: the model with its card, every file with its hash, packages, base model and corpus.

    Raises BundleError if manifest.json cannot be read.
    """
    manifest = bundle.manifest
    digest = hash_plain(bundle.folder / MANIFEST_NAME, MAX_BYTES)[1]
    base = _base_model(manifest)
    packages = [_package(name, version) for name, version in manifest.provenance.versions.items()]
    corpus: list[dict[str, Any]] = [_corpus(manifest)] if _trained(manifest) else []
    used = [_BASE] * bool(base) + [_CORPUS] * bool(corpus) + [package["bom-ref"] for package in packages]
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, digest)}",
        "version": 1,
        "metadata": {
            "timestamp": manifest.created,
            "tools": {"components": [{"type": "application", "name": "gpt2-bundle", "version": __version__}]},
            "component": _model(manifest, digest, base, trained=bool(corpus)),
        },
        "components": [*(_file(artifact) for artifact in manifest.artifacts), *corpus, *packages],
        "dependencies": [{"ref": _MODEL, "dependsOn": [ref for ref in used if ref != _BASE]}],
        "compositions": [
            {"aggregate": "complete", "assemblies": [_file_ref(artifact.path) for artifact in manifest.artifacts]},
            {"aggregate": "incomplete", "dependencies": [_MODEL]},
        ],
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _model(manifest: Manifest, digest: str, base: dict[str, Any] | None, *, trained: bool) -> dict[str, Any]:
    model = manifest.model
    facts: dict[str, Any] = {"parameters": model.parameters, "seed": manifest.provenance.seed}
    facts |= {name: getattr(model, name) for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")}
    facts |= {"tokenizer": manifest.tokenizer.id, "graphs": " ".join(manifest.graphs)}
    parameters: dict[str, Any] = {
        "task": "text-generation",
        "architectureFamily": "transformer",
        "modelArchitecture": "GPT-2",
    }
    if trained:
        parameters = {"approach": {"type": _approach(manifest)}, **parameters, "datasets": [{"ref": _CORPUS}]}
    text = [{"format": "text"}]
    card: dict[str, Any] = {"modelParameters": {**parameters, "inputs": text, "outputs": text}}
    if manifest.quality:
        metrics = [{"type": name, "value": repr(value)} for name, value in manifest.quality.items()]
        card["quantitativeAnalysis"] = {"performanceMetrics": metrics}
    return {
        "type": "machine-learning-model",
        "bom-ref": _MODEL,
        "name": manifest.name,
        "hashes": [{"alg": "SHA-256", "content": digest}],
        **({"pedigree": {"ancestors": [base]}} if base else {}),
        "modelCard": card,
        "properties": _properties(facts | {"hash-of": MANIFEST_NAME}),
    }


def _table(manifest: Manifest, name: str) -> Mapping[str, Any]:
    """A table of the recipe; empty if the manifest has none of this name."""
    found = manifest.provenance.recipe.get(name)
    return found if isinstance(found, Mapping) else {}


def _base_model(manifest: Manifest) -> dict[str, Any] | None:
    """The base checkpoint. Of a folder only the name: the document says nothing about the machine that built it."""
    base = _table(manifest, "model").get("base")
    if not isinstance(base, str) or not base:
        return None
    local = base.startswith((".", "/", "~")) or base.count("/") > 1
    return {
        "type": "machine-learning-model",
        "bom-ref": _BASE,
        "name": PurePath(base).name if local else base,
        "properties": _properties({"recipe-key": "model.base"}),
    }


def _trained(manifest: Manifest) -> bool:
    """Whether the corpus changed the weights: 0 epochs export a base or random weights as they are."""
    return _table(manifest, "training").get("epochs") != 0


def _approach(manifest: Manifest) -> str:
    instruction = _table(manifest, "instruction")
    pairs = any(instruction.get(key) for key in ("prompt_field", "response_field", "messages_field"))
    return "supervised" if pairs else "self-supervised"


def _corpus(manifest: Manifest) -> dict[str, Any]:
    corpus = _table(manifest, "corpus")
    paths = [str(path) for path in corpus.get("paths") or ()]
    builtin = corpus.get("builtin")
    names = [PurePath(path).name for path in paths] or ([builtin] if isinstance(builtin, str) else [])
    return {
        "type": "data",
        "bom-ref": _CORPUS,
        "name": ", ".join(names) or "corpus",
        "hashes": [{"alg": "SHA-256", "content": manifest.provenance.corpus_sha256}],
        "data": [{"type": "dataset"}],
        "properties": _properties({"hash-of": "the training and the validation documents"}),
    }


def _package(name: str, version: str) -> dict[str, Any]:
    purl = f"pkg:generic/python@{version}" if name == "python" else f"pkg:pypi/{name}@{version}"
    kind = "platform" if name == "python" else "library"
    return {"type": kind, "bom-ref": purl, "name": name, "version": version, "purl": purl}


def _file(artifact: Artifact) -> dict[str, Any]:
    return {
        "type": "file",
        "bom-ref": _file_ref(artifact.path),
        "name": artifact.path,
        "hashes": [{"alg": "SHA-256", "content": artifact.sha256}],
        "properties": _properties({"size": artifact.size}),
    }


def _file_ref(path: str) -> str:
    return f"file:{path}"


def _properties(facts: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"name": f"gpt2-bundle:{name}", "value": str(value)} for name, value in facts.items()]
