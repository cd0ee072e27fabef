"""Deployments to containers and clusters: valid for the published schemas, true to the server, and no file lost."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from serving.bundle import open_bundle
from serving.cli import run
from serving.commands.serve import serve
from serving.deploy import endpoints
from serving.deploy.workload import ServeOptions, Workload
from serving.engine.config import EngineConfig, estimate_memory
from serving.entrypoints import runner
from serving.entrypoints.http_app import build_app
from serving.server.auth import KEYS_VARIABLE
from serving.server.metrics import GAUGES, PREFIX
from serving.server.registry import ModelRegistry
from serving.server.settings import Settings

ROOT = Path(__file__).parents[3]
KUBERNETES = "1.37"
_OPERATORS = ("keda.sh", "monitoring.coreos.com", "serving.kserve.io", "kustomize.config.k8s.io")
MIB = 1 << 20


def deploy(bundle: Path, output: Path, target: str, *more: str) -> Path:
    assert run(["deploy", str(bundle), "--target", target, "--output", str(output), *more]) == 0
    return output


def documents(folder: Path) -> dict[str, Any]:
    return {
        path.relative_to(folder).as_posix(): yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*.yaml"))
    }


def closed(**properties: Any) -> dict[str, Any]:
    """The schema of an object with these keys, all of them and no other."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}
LABELS = closed(matchLabels={"type": "object", "additionalProperties": TEXT, "minProperties": 1})
SCRAPE = {"type": "array", "minItems": 1, "items": closed(port={"const": "http"}, path=TEXT, interval=TEXT)}
NUMBER = {"type": "string", "pattern": "^[0-9]+$"}
TRIGGER = closed(
    type={"const": "prometheus"},
    metricType={"const": "AverageValue"},
    metadata=closed(serverAddress={"type": "string", "pattern": "^https?://"}, query=TEXT, threshold=NUMBER),
)
URL = {"type": "string", "pattern": "^https?://"}
EXTERNAL = closed(
    metric=closed(backend={"const": "prometheus"}, serverAddress=URL, query=TEXT),
    target=closed(type={"const": "Value"}, value=NUMBER),
)
# What the operators' CRDs say of the fields that are written here.
SPECS = {
    "ScaledObject": closed(
        scaleTargetRef=closed(name=TEXT),
        minReplicaCount=COUNT,
        maxReplicaCount=COUNT,
        pollingInterval=COUNT,
        cooldownPeriod=COUNT,
        fallback=closed(failureThreshold=COUNT, replicas=COUNT),
        triggers={"type": "array", "minItems": 1, "items": TRIGGER},
    ),
    "ServiceMonitor": closed(selector=LABELS, endpoints=SCRAPE),
    "PodMonitor": closed(selector=LABELS, podMetricsEndpoints=SCRAPE),
}


def validate(document: dict[str, Any]) -> None:
    """Raise for what the API server, or the operator, would refuse."""
    kind = document["kind"]
    if document["apiVersion"].partition("/")[0] not in _OPERATORS:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    elif kind == "InferenceService":
        # KServe's predictor is a pod spec with fields of its own.
        predictor = dict(document["spec"]["predictor"])
        own = {name: predictor.pop(name) for name in ("minReplicas", "maxReplicas", "autoScaling")}
        metric = closed(type={"const": "External"}, external=EXTERNAL)
        scaling = closed(metrics={"type": "array", "minItems": 1, "items": metric})
        jsonschema.validate(own, closed(minReplicas=COUNT, maxReplicas=COUNT, autoScaling=scaling))
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": document["metadata"], "spec": predictor}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    elif kind != "Kustomization":
        jsonschema.validate(document["spec"], SPECS[kind])


def pod_specs(found: dict[str, Any]) -> list[dict[str, Any]]:
    specs = []
    for document in found.values():
        match document.get("kind"):
            case "Deployment":
                specs.append(document["spec"]["template"]["spec"])
            case "InferenceService":
                specs.append(document["spec"]["predictor"])
            case "Pod":
                specs.append(document["spec"])
    return specs


@pytest.mark.parametrize("source", ["pvc", "image", "init"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("target", ["kubernetes", "kserve"])
def test_manifests_are_valid(real_bundle: Path, tmp_path: Path, target: str, device: str, source: str) -> None:
    options = ["--bundle-source", source, "--device", device, "--namespace", "models"]
    folder = deploy(real_bundle, tmp_path / "here", target, *options)
    found = documents(folder)
    values = found.pop("optional/prometheus-adapter-values.yaml", None)
    assert (values is not None) == (target == "kubernetes")
    for document in found.values():
        validate(document)
    # Kustomize applies all that needs no operator, once.
    listed = found.pop("kustomization.yaml")["resources"]
    assert sorted(listed) == sorted(path for path in found if not path.startswith("optional/"))
    assert {document["metadata"]["namespace"] for document in found.values()} == {"models"}
    assert (folder / "bundle.Dockerfile").exists() == (source != "pvc")
    for spec in pod_specs(found):
        restricted(spec)
    board = found["optional/grafana-dashboard.yaml"]["data"]["gpt2-bundle-serve.json"]
    assert json.loads(board) == json.loads((ROOT / "serving/server/grafana_dashboard.json").read_text(encoding="utf-8"))


def restricted(spec: dict[str, Any]) -> None:
    """What the Pod Security Standard "restricted" asks; also limits, and a root file system that is read-only."""
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not spec["automountServiceAccountToken"]
    volumes = {volume["name"] for volume in spec["volumes"]}
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        context = container["securityContext"]
        assert not context["allowPrivilegeEscalation"] and context["capabilities"] == {"drop": ["ALL"]}
        assert context["readOnlyRootFilesystem"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("deployment.yaml", {"spec": {"replicas": "two"}}),
        ("service.yaml", {"spec": {"port": 1}}),
        ("optional/keda.yaml", {"spec": {"maxReplicas": 3}}),
        ("optional/service-monitor.yaml", {"spec": {"endpoints": []}}),
    ],
)
def test_the_schemas_refuse_a_wrong_manifest(real_bundle: Path, tmp_path: Path, path: str, wrong: Any) -> None:
    document = documents(deploy(real_bundle, tmp_path / "here", "kubernetes"))[path]
    document["spec"] |= wrong["spec"]
    with pytest.raises((kubernetes_validate.ValidationError, jsonschema.ValidationError)):
        validate(document)


def test_the_table_is_what_the_server_has() -> None:
    registry = ModelRegistry()
    routes = {getattr(route, "path", None) for route in build_app(registry, Settings()).routes}
    assert {probe.path for probe in endpoints.PROBES} | {endpoints.METRICS_PATH} <= routes
    assert {metric.name for metric in endpoints.METRICS} <= {PREFIX + name for name in GAUGES}
    assert endpoints.FLUSH_SECONDS == runner.FLUSH_SECONDS
    assert Settings().max_bodies_bytes == endpoints.BODY_BYTES
    assert endpoints.KEYS_VARIABLE == KEYS_VARIABLE


def test_objects_find_each_other(real_bundle: Path, tmp_path: Path) -> None:
    found = documents(deploy(real_bundle, tmp_path / "here", "kubernetes", "--max-num-seqs", "12"))
    pod = found["deployment.yaml"]["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert found["deployment.yaml"]["spec"]["selector"]["matchLabels"] == labels
    assert found["service.yaml"]["spec"]["selector"] == labels
    assert found["disruption-budget.yaml"]["spec"]["selector"]["matchLabels"] == labels
    assert found["network-policy.yaml"]["spec"]["podSelector"]["matchLabels"] == labels
    assert found["optional/service-monitor.yaml"]["spec"]["selector"]["matchLabels"].items() <= (
        found["service.yaml"]["metadata"]["labels"].items()
    )
    name = found["deployment.yaml"]["metadata"]["name"]
    assert found["optional/hpa.yaml"]["spec"]["scaleTargetRef"]["name"] == name
    assert found["optional/keda.yaml"]["spec"]["scaleTargetRef"]["name"] == name
    # The loader is not a server: the Service and the budget must not select it.
    loader = found["optional/bundle-loader.yaml"]
    assert not labels.items() <= loader["metadata"]["labels"].items()
    claim = found["bundle-claim.yaml"]["metadata"]["name"]
    assert pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim
    assert loader["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim
    trigger = found["optional/keda.yaml"]["spec"]["triggers"][0]["metadata"]
    assert trigger["query"] == 'sum(gpt2_bundle_num_requests_waiting{model_name="bytes"})'
    assert (
        trigger["threshold"]
        == found["optional/hpa.yaml"]["spec"]["metrics"][0]["pods"]["target"]["averageValue"]
        == "3"
    )
    ports = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
    assert {port["targetPort"] for port in found["service.yaml"]["spec"]["ports"]} == ports


def test_a_pod_outlives_its_drain_and_has_the_memory_that_is_needed(real_bundle: Path, tmp_path: Path) -> None:
    folder = deploy(real_bundle, tmp_path / "here", "kubernetes", "--drain-timeout", "90.5", "--cpus", "3")
    spec = pod_specs({"": documents(folder)["deployment.yaml"]})[0]
    container = spec["containers"][0]
    seconds = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] >= seconds + 90.5 + runner.FLUSH_SECONDS
    engine = estimate_memory(open_bundle(real_bundle), "ort/fp32", EngineConfig(slots=16)).total
    limit = int(container["resources"]["limits"]["memory"].removesuffix("Mi")) * MIB
    assert engine + endpoints.PROCESS_BYTES + endpoints.BODY_BYTES <= limit < engine + 600 * MIB
    assert container["resources"]["limits"]["cpu"] == "3" and "--threads=3" in container["args"]
    # The server takes these arguments, and refuses within the limit what would be killed above it.
    context = serve.make_context("serve", list(container["args"]))
    assert context.params["drain_timeout"] == 90.5
    assert engine <= context.params["memory_budget"] <= limit - endpoints.BODY_BYTES


@pytest.mark.parametrize("target", ["compose", "kubernetes"])
def test_the_server_starts_with_the_arguments_and_answers_the_probes(
    real_bundle: Path, tmp_path: Path, target: str
) -> None:
    found = documents(deploy(real_bundle, tmp_path / "here", target))
    if target == "compose":
        service = found["compose.yaml"]["services"]["server"]
        arguments, mount = service["command"], service["volumes"][0]
        assert (tmp_path / "here" / mount["source"]).resolve() == real_bundle.resolve()
        assert mount["target"] == arguments[0]
    else:
        arguments = pod_specs({"": found["deployment.yaml"]})[0]["containers"][0]["args"]
    # The folder and the ports are the container's; all else is as it is.
    ours = [str(real_bundle), *(re.sub(r"(port)=\d+", r"\1=0", argument) for argument in arguments[1:])]
    command = [sys.executable, "-m", "serving.cli", "serve", *ours]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    ) as server:  # fmt: skip
        assert server.stdout is not None and server.stderr is not None
        line = server.stdout.readline()
        assert line, server.stderr.read()
        threading.Thread(target=server.stderr.read, daemon=True).start()
        url = re.sub("//0.0.0.0", "//127.0.0.1", line.split()[-1])
        for path in [probe.path for probe in endpoints.PROBES]:
            with urllib.request.urlopen(url + path, timeout=30) as answer:
                assert answer.status == 200
        with urllib.request.urlopen(url + endpoints.METRICS_PATH, timeout=30) as answer:
            text = answer.read().decode()
        assert all(f"\n{metric.name}{{" in text for metric in endpoints.METRICS)
        if target == "compose":
            check = service["healthcheck"]["test"]
            local = [check[3].replace(f":{endpoints.HTTP.number}/", f":{url.rpartition(':')[2]}/")]
            assert subprocess.run([sys.executable, "-c", *local], timeout=30).returncode == 0
        began = time.monotonic()
        server.terminate()
        assert server.wait(30) == 0 and time.monotonic() - began < 30
        if target == "compose":
            assert subprocess.run([sys.executable, "-c", *local], capture_output=True, timeout=30).returncode != 0


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def made(name: str, **options: Any) -> Workload:
        return Workload(name, ServeOptions("ort/fp32", **options), 100 * MIB, 10 * MIB, "0" * 64)

    return made


@pytest.mark.parametrize("name", ["gpt2-docs", "Gpt2_Docs", "2nd.model", "x" * 100, "a", "A", "0", "a-", "a.b", "a-b"])
def test_every_model_name_gives_a_name_of_its_own_that_kubernetes_takes(load: Any, name: str) -> None:
    # RFC 1035, as a Service's name must be, with room for the longest suffix.
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", load(name).label)
    assert len(load(name).label + "-dashboard") <= 63
    others = {load(other).label for other in ("gpt2-docs", "gpt2_docs", "GPT2-docs", "a", "A", "a.b", "a-b", "a_b")}
    assert len(others) == 8


def test_a_limit_below_the_need_is_refused_and_one_above_is_used(load: Any) -> None:
    assert load("a", memory_limit=2 << 30).memory_mib == 2048
    assert load("a").memory_mib * MIB >= load("a").needed_bytes
    assert load("a", device="cuda").needed_bytes == load("a").needed_bytes + endpoints.CUDA_BYTES
    assert "--memory-budget=100MiB" in load("a", memory_limit=load("a").needed_bytes).arguments()
