"""KServe: an InferenceService whose predictor is the server's own container."""

from __future__ import annotations

from serving.deploy.endpoints import HTTP, METRICS_PATH
from serving.deploy.kubernetes import (
    OPTIONAL,
    Document,
    bundle_volume,
    disruption_budget,
    document,
    grafana_dashboard,
    network_policy,
    pod_spec,
    queue_query,
)
from serving.deploy.workload import Workload


def kserve_manifests(load: Workload) -> dict[str, Document]:
    """File name to document, as `kubernetes.manifests` has them."""
    # KServe gives its pods this label.
    pods = {"serving.kserve.io/inferenceservice": load.label}
    scrape = {"port": HTTP.name, "path": METRICS_PATH, "interval": "15s"}
    monitor = {"selector": {"matchLabels": pods}, "podMetricsEndpoints": [scrape]}
    return {
        "inference-service.yaml": _inference_service(load),
        "disruption-budget.yaml": disruption_budget(load, pods),
        "network-policy.yaml": network_policy(load, pods),
        **bundle_volume(load),
        f"{OPTIONAL}/pod-monitor.yaml": document(load, "monitoring.coreos.com/v1", "PodMonitor", monitor),
        f"{OPTIONAL}/grafana-dashboard.yaml": grafana_dashboard(load),
    }


def _inference_service(load: Workload) -> Document:
    options = load.options
    external = {
        "metric": {"backend": "prometheus", "serverAddress": options.prometheus_url, "query": queue_query(load)},
        # KServe reads `value` alone, as the threshold of a KEDA trigger, which is an average over the pods.
        "target": {"type": "Value", "value": str(load.queue_target)},
    }
    predictor = {
        "minReplicas": options.replicas,
        "maxReplicas": options.max_replicas,
        "autoScaling": {"metrics": [{"type": "External", "external": external}]},
        **pod_spec(load, "kserve-container"),
    }
    made = document(load, "serving.kserve.io/v1beta1", "InferenceService", {"predictor": predictor})
    # Volumes, preStop and the queue metric need plain Deployments; KServe before 0.16 calls this mode RawDeployment.
    made["metadata"]["annotations"] = {
        "serving.kserve.io/deploymentMode": "Standard",
        "serving.kserve.io/autoscalerClass": "keda",
    }
    return made
