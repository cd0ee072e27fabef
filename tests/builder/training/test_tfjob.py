"""The example of a Kubeflow TFJob: pods that Kubernetes takes, fields of the operator, and a command that is one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from builder.commands.build import build
from builder.recipe_reader import read_recipe
from builder.training.cluster import check_batch, read_cluster

PAGE = Path(__file__).parents[3] / "docs" / "guides" / "train-tfjob.yaml"
KUBERNETES = "1.37"


def closed(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


# What the operator's CRD says of the fields that are written here; the pod template is Kubernetes's own.
REPLICA = closed(
    replicas={"type": "integer", "minimum": 1},
    restartPolicy={"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
    template=closed(spec={"type": "object"}),
)
SPEC = closed(
    runPolicy=closed(cleanPodPolicy={"enum": ["All", "Running", "None"]}, backoffLimit={"type": "integer"}),
    tfReplicaSpecs=closed(Chief=REPLICA, Worker=REPLICA),
)


@pytest.fixture
def job() -> dict[str, Any]:
    document = yaml.safe_load(PAGE.read_text(encoding="utf-8"))
    assert (document["apiVersion"], document["kind"]) == ("kubeflow.org/v1", "TFJob")
    return document  # type: ignore[no-any-return]


def test_the_job_has_the_operators_fields_and_valid_pods(job: dict[str, Any]) -> None:
    jsonschema.validate(job["spec"], SPEC)
    for replica in job["spec"]["tfReplicaSpecs"].values():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": job["metadata"], "spec": replica["template"]["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        [container] = pod["spec"]["containers"]
        assert container["name"] == "tensorflow"
        assert container["ports"] == [{"name": "tfjob-port", "containerPort": 2222}]
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["spec"]["volumes"]}


@pytest.mark.skipif("TFJOB_CRD" not in os.environ, reason="TFJOB_CRD names no kubeflow.org_tfjobs.yaml")
def test_the_job_is_valid_for_the_operators_whole_schema(job: dict[str, Any]) -> None:
    definition = yaml.safe_load(Path(os.environ["TFJOB_CRD"]).read_text(encoding="utf-8"))
    [version] = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    schema = version["schema"]["openAPIV3Schema"]
    close(schema["properties"]["spec"])
    jsonschema.validate(job, schema)
    job["spec"]["tfReplicaSpecs"]["Worker"]["restarts"] = 1
    with pytest.raises(jsonschema.ValidationError, match="'restarts' was unexpected"):
        jsonschema.validate(job, schema)


def close(schema: Any) -> None:
    """Refuse unknown fields everywhere, as `kubectl apply` does."""
    if isinstance(schema, dict):
        if "properties" in schema and "x-kubernetes-preserve-unknown-fields" not in schema:
            schema.setdefault("additionalProperties", False)
        for value in schema.values():
            close(value)
    elif isinstance(schema, list):
        for value in schema:
            close(value)


def test_its_command_is_one_that_all_workers_can_run(job: dict[str, Any]) -> None:
    roles = job["spec"]["tfReplicaSpecs"]
    # As the operator names pods and their headless services.
    cluster = {
        role.lower(): [f"gpt2-notes-{role.lower()}-{index}.default.svc:2222" for index in range(spec["replicas"])]
        for role, spec in roles.items()
    }
    ranks = []
    for role, spec in roles.items():
        [container] = spec["template"]["spec"]["containers"]
        program, name, *arguments = container["command"]
        assert (program, name) == ("gpt2-bundle", "build")
        context = build.make_context("build", arguments)
        recipe = read_recipe(context.params["recipe_path"], context.params["overrides"])
        for index in range(spec["replicas"]):
            task = {"type": role.lower(), "index": index}
            config = json.dumps({"cluster": cluster, "task": task, "environment": "cloud"})
            found = read_cluster({"TF_CONFIG": config})
            assert found is not None
            check_batch(recipe.training, found.size)
            ranks.append(found.rank)
    assert ranks == [0, 1, 2, 3]
