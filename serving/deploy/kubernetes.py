"""Kubernetes manifests for a bundle: the server, its network, its bundle, autoscalers and monitoring."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from typing import Any

from serving.deploy.endpoints import HTTP, METRICS_PATH, PORTS, QUEUE
from serving.deploy.workload import BUNDLES, Workload, container_security, pod_security

Document = dict[str, Any]
OPTIONAL = "optional"
LOADER_IMAGE = "python:3.12-slim"


def manifests(load: Workload) -> dict[str, Document]:
    """File name to document; those in the folder OPTIONAL need operators of the cluster."""
    return {
        "deployment.yaml": _deployment(load),
        "service.yaml": _service(load),
        "disruption-budget.yaml": disruption_budget(load, selector(load)),
        "network-policy.yaml": network_policy(load, selector(load)),
        **bundle_volume(load),
        f"{OPTIONAL}/hpa.yaml": _autoscaler(load),
        f"{OPTIONAL}/prometheus-adapter-values.yaml": _adapter_values(),
        f"{OPTIONAL}/keda.yaml": _scaled_object(load),
        f"{OPTIONAL}/service-monitor.yaml": _service_monitor(load),
        f"{OPTIONAL}/grafana-dashboard.yaml": grafana_dashboard(load),
    }


def kustomization(documents: Iterable[str]) -> Document:
    """What `kubectl apply -k` applies: those of `documents`, file names, that are not in the folder OPTIONAL."""
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [name for name in documents if not name.startswith(OPTIONAL)],
    }


def document(load: Workload, version: str, kind: str, spec: Document, suffix: str = "") -> Document:
    """An object of the deployment, named after it."""
    namespace = {"namespace": load.options.namespace} if load.options.namespace else {}
    labels = selector(load) | {"app.kubernetes.io/managed-by": "gpt2-bundle"}
    metadata = {"name": load.label + suffix, **namespace, "labels": labels}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec}


def selector(load: Workload) -> dict[str, str]:
    """Labels of the pods, which other objects find them by."""
    return {"app.kubernetes.io/name": "gpt2-bundle", "app.kubernetes.io/instance": load.label}


def pod_spec(load: Workload, container: str) -> Document:
    """The pod: its container, called `container`, with the bundle from the source that the options name."""
    source, folder = load.options.bundle_source, f"{BUNDLES}/{load.model}"
    mount: Document = {"name": "bundle", "mountPath": BUNDLES, "readOnly": True}
    first: list[Document] = []
    if source == "pvc":
        volume: Document = {"persistentVolumeClaim": {"claimName": f"{load.label}-bundle", "readOnly": True}}
    elif source == "image":
        volume = {"image": {"reference": load.bundle_image, "pullPolicy": "IfNotPresent"}}
        mount["mountPath"] = folder
    else:
        volume = {"emptyDir": {"sizeLimit": f"{load.bundle_gib}Gi"}}
        resources = {"cpu": "100m", "memory": "128Mi"}
        first = [
            {
                "name": "copy-bundle",
                "image": load.bundle_image,
                # The volume outlives an init container that is started again.
                "command": ["sh", "-c", f"rm -rf {folder} && cp -r /bundle {folder}"],
                "resources": {"requests": resources, "limits": resources},
                "securityContext": container_security(),
                "volumeMounts": [{"name": "bundle", "mountPath": BUNDLES}],
            }
        ]
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": load.pod_grace_seconds,
        "securityContext": pod_security(),
        **({"initContainers": first} if first else {}),
        "containers": [load.container(container, [mount])],
        "volumes": [{"name": "bundle", **volume}, {"name": "tmp", "emptyDir": {"sizeLimit": "256Mi"}}],
    }


def _deployment(load: Workload) -> Document:
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": selector(load)},
    }
    spec = {
        "replicas": load.options.replicas,
        "selector": {"matchLabels": selector(load)},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
        "template": {
            "metadata": {"labels": selector(load), "annotations": {"checksum/bundle": load.digest}},
            "spec": pod_spec(load, "server") | {"topologySpreadConstraints": [spread]},
        },
    }
    return document(load, "apps/v1", "Deployment", spec)


def _service(load: Workload) -> Document:
    ports = [{"name": port.name, "port": port.number, "targetPort": port.name, "protocol": "TCP"} for port in PORTS]
    return document(load, "v1", "Service", {"type": "ClusterIP", "selector": selector(load), "ports": ports})


def disruption_budget(load: Workload, labels: dict[str, str]) -> Document:
    """A node that is drained takes one pod at a time."""
    spec = {
        "maxUnavailable": 1,
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
        "selector": {"matchLabels": labels},
    }
    return document(load, "policy/v1", "PodDisruptionBudget", spec)


def network_policy(load: Workload, labels: dict[str, str]) -> Document:
    """Pods of the same namespace reach the server, and Prometheus its HTTP port; the server reaches nothing."""
    monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    spec = {
        "podSelector": {"matchLabels": labels},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [
            {"from": [{"podSelector": {}}], "ports": [{"port": port.number, "protocol": "TCP"} for port in PORTS]},
            {"from": [monitoring], "ports": [{"port": HTTP.number, "protocol": "TCP"}]},
        ],
        "egress": [],
    }
    return document(load, "networking.k8s.io/v1", "NetworkPolicy", spec)


def bundle_volume(load: Workload) -> dict[str, Document]:
    """The claim of the bundle's volume and a pod that copies a bundle into it; nothing for other sources."""
    if load.options.bundle_source != "pvc":
        return {}
    claim = {
        # Pods of several nodes read it, and the loader writes it.
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": f"{load.bundle_gib}Gi"}},
    }
    resources = {"cpu": "100m", "memory": "256Mi"}
    loader = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": pod_security(),
        "containers": [
            {
                "name": "loader",
                "image": LOADER_IMAGE,
                "command": ["sleep", "3600"],
                "resources": {"requests": resources, "limits": resources},
                "securityContext": container_security(),
                "volumeMounts": [{"name": "bundle", "mountPath": BUNDLES}],
            }
        ],
        "volumes": [{"name": "bundle", "persistentVolumeClaim": {"claimName": f"{load.label}-bundle"}}],
    }
    pod = document(load, "v1", "Pod", loader, "-loader")
    # The Service and the budget must not take it for a server.
    pod["metadata"]["labels"] = {"app.kubernetes.io/name": "gpt2-bundle-loader"}
    return {
        "bundle-claim.yaml": document(load, "v1", "PersistentVolumeClaim", claim, "-bundle"),
        f"{OPTIONAL}/bundle-loader.yaml": pod,
    }


def _autoscaler(load: Workload) -> Document:
    target = {"type": "AverageValue", "averageValue": str(load.queue_target)}
    spec = {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": load.label},
        "minReplicas": load.options.replicas,
        "maxReplicas": load.options.max_replicas,
        "metrics": [{"type": "Pods", "pods": {"metric": {"name": QUEUE.name}, "target": target}}],
        "behavior": {"scaleDown": {"stabilizationWindowSeconds": 300}},
    }
    return document(load, "autoscaling/v2", "HorizontalPodAutoscaler", spec)


def _adapter_values() -> Document:
    """Helm values for prometheus-adapter, which gives the HPA the queue metric of each pod."""
    rule = {
        "seriesQuery": f'{QUEUE.name}{{namespace!="",pod!=""}}',
        "resources": {"overrides": {"namespace": {"resource": "namespace"}, "pod": {"resource": "pod"}}},
        "name": {"matches": QUEUE.name, "as": QUEUE.name},
        "metricsQuery": "sum(<<.Series>>{<<.LabelMatchers>>}) by (<<.GroupBy>>)",
    }
    return {"rules": {"custom": [rule]}}


def queue_query(load: Workload) -> str:
    """The waiting requests of all pods, in Prometheus's language."""
    labels = {"namespace": load.options.namespace, "model_name": load.model}
    matchers = ",".join(f'{name}="{value}"' for name, value in labels.items() if value)
    return f"sum({QUEUE.name}{{{matchers}}})"


def _scaled_object(load: Workload) -> Document:
    options = load.options
    trigger = {
        "serverAddress": options.prometheus_url,
        "query": queue_query(load),
        "threshold": str(load.queue_target),
    }
    spec = {
        "scaleTargetRef": {"name": load.label},
        "minReplicaCount": options.replicas,
        "maxReplicaCount": options.max_replicas,
        "pollingInterval": 15,
        "cooldownPeriod": 300,
        # Without Prometheus the number of pods stays at its minimum.
        "fallback": {"failureThreshold": 3, "replicas": options.replicas},
        "triggers": [{"type": "prometheus", "metricType": "AverageValue", "metadata": trigger}],
    }
    return document(load, "keda.sh/v1alpha1", "ScaledObject", spec)


def _service_monitor(load: Workload) -> Document:
    scrape = {"port": HTTP.name, "path": METRICS_PATH, "interval": "15s"}
    spec = {"selector": {"matchLabels": selector(load)}, "endpoints": [scrape]}
    return document(load, "monitoring.coreos.com/v1", "ServiceMonitor", spec)


def grafana_dashboard(load: Workload) -> Document:
    """The server's dashboard as a ConfigMap that Grafana's sidecar finds by its label."""
    made = document(load, "v1", "ConfigMap", {}, "-dashboard")
    made["metadata"]["labels"] |= {"grafana_dashboard": "1"}
    del made["spec"]
    board = (files("serving") / "server" / "grafana_dashboard.json").read_text(encoding="utf-8")
    return made | {"data": {"gpt2-bundle-serve.json": board.rstrip("\n") + "\n"}}
