"""Deployments against the operators' own schemas, from a folder of files that CRDS names.

The files are those of the operators' repositories: `serving.kserve.io_inferenceservices.yaml`,
`keda.sh_scaledobjects.yaml`, `ray.io_rayservices.yaml`, `monitoring.coreos.com_servicemonitors.yaml`,
`monitoring.coreos.com_podmonitors.yaml` and Compose's `compose-spec.json`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from serving.cli import run

CRDS = os.environ.get("CRDS")
pytestmark = [
    pytest.mark.ecosystem,
    pytest.mark.skipif(CRDS is None, reason="CRDS names no folder of operators' schemas"),
]
_DOCUMENTS = [
    ("kserve", "inference-service.yaml", "serving.kserve.io_inferenceservices.yaml"),
    ("kserve", "optional/pod-monitor.yaml", "monitoring.coreos.com_podmonitors.yaml"),
    ("kubernetes", "optional/keda.yaml", "keda.sh_scaledobjects.yaml"),
    ("kubernetes", "optional/service-monitor.yaml", "monitoring.coreos.com_servicemonitors.yaml"),
    ("ray", "ray-service.yaml", "ray.io_rayservices.yaml"),
    ("compose", "compose.yaml", "compose-spec.json"),
]


def strict(schema: Any) -> Any:
    """A CRD's schema as JSON Schema that refuses unknown fields, as the API server does with strict checks."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {name: strict(each) for name, each in schema.items()}
    if isinstance(made.get("properties"), dict) and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def schema_of(path: Path, version: str) -> Any:
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    crd = yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)
    found = next(each for each in crd["spec"]["versions"] if each["name"] == version)
    schema = strict(found["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


@pytest.mark.parametrize("source", ["pvc", "image", "init"])
@pytest.mark.parametrize(("target", "name", "file"), _DOCUMENTS)
def test_the_operators_take_it(
    real_bundle: Path, tmp_path: Path, target: str, name: str, file: str, source: str
) -> None:
    more = [] if target == "compose" else ["--bundle-source", source]
    arguments = ["deploy", str(real_bundle), "--target", target, "--output", str(tmp_path / "here"), *more]
    assert run([*arguments, "--device", "cuda"]) == 0
    document = yaml.safe_load((tmp_path / "here" / name).read_text(encoding="utf-8"))
    schema = schema_of(Path(str(CRDS)) / file, str(document.get("apiVersion")).rpartition("/")[2])
    jsonschema.Draft7Validator(schema).validate(document)
    inner = next(iter(document["services"].values())) if target == "compose" else document["spec"]
    inner["unknown"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(schema).validate(document)
