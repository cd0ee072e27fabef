"""Ray Serve: a configuration for a cluster that runs already, and a RayService of the KubeRay operator."""

from __future__ import annotations

from typing import Any

from serving import __version__
from serving.deploy.endpoints import HTTP
from serving.deploy.kubernetes import Document, bundle_volume, document, pod_spec
from serving.deploy.workload import BUNDLES, Workload
from serving.support.yaml_text import yaml_text

RAY_VERSION = "2.60.0"
APPLICATION = "serving.ray.app:build"
# Host memory of a pod's raylet, agents, proxy and ingress, and of its object store.
_RAY_MIB = 1024
_SHARED_MEMORY = {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "256Mi"}}


def serve_config(load: Workload, folder: str, host: str, *, check_resources: bool) -> dict[str, Any]:
    """The Serve configuration; `folder` is the bundle's on each node.

    `check_resources` is false for a cluster that adds nodes by itself: it may have none at first.
    """
    options = load.options
    ignored = ("--host=", "--port=", "--grpc-port=")
    args = {
        "bundle": folder,
        "serve": [flag for flag in load.arguments()[1:] if not flag.startswith(ignored)],
        "cpus": float(options.cpus),
        "memory": load.memory_mib << 20,
        "gpus": 1.0 if options.device == "cuda" else 0.0,
        "min_replicas": options.replicas,
        "max_replicas": options.max_replicas,
        "check_resources": check_resources,
    }
    application = {"name": load.label, "route_prefix": "/", "import_path": APPLICATION, "args": args}
    return {"http_options": {"host": host, "port": HTTP.number}, "applications": [application]}


def ray_manifests(load: Workload) -> dict[str, Document]:
    """File name to document: the RayService, and the bundle's volume."""
    return {"ray-service.yaml": _ray_service(load), **bundle_volume(load)}


def ray_image(load: Workload) -> str:
    """The image of all pods of the Ray cluster."""
    return load.options.image or f"gpt2-bundle-ray:{__version__}-{load.options.device}"


def _ray_service(load: Workload) -> Document:
    options = load.options
    gpu = {"nvidia.com/gpu": "1"} if options.device == "cuda" else {}
    worker = {"cpu": str(options.cpus), "memory": f"{load.memory_mib + _RAY_MIB}Mi", **gpu}
    head = {"cpu": "1", "memory": f"{2 * _RAY_MIB}Mi"}
    cluster: dict[str, Any] = {
        "rayVersion": RAY_VERSION,
        "enableInTreeAutoscaling": True,
        # The head node has the cluster's state, the proxy and the ingress, and no replica.
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": {"spec": _pod(load, "ray-head", head)}},
        "workerGroupSpecs": [
            {
                "groupName": "replicas",
                "replicas": options.replicas,
                "minReplicas": options.replicas,
                "maxReplicas": options.max_replicas,
                "rayStartParams": {},
                "template": {"spec": _pod(load, "ray-worker", worker)},
            }
        ],
    }
    # The autoscaler next to the head asks Kubernetes for pods.
    del cluster["headGroupSpec"]["template"]["spec"]["automountServiceAccountToken"]
    config = serve_config(load, f"{BUNDLES}/{load.model}", "0.0.0.0", check_resources=False)
    return document(
        load, "ray.io/v1", "RayService", {"serveConfigV2": yaml_text([config]), "rayClusterConfig": cluster}
    )


def _pod(load: Workload, name: str, resources: dict[str, str]) -> Document:
    """The pod of `gpt2-bundle serve` with another image and no arguments: KubeRay adds command and probes."""
    spec = pod_spec(load, name)
    (container,) = spec["containers"]
    kept = {key: container[key] for key in ("name", "env", "securityContext")}
    spec["containers"] = [
        {
            **kept,
            "image": ray_image(load),
            "resources": {"requests": resources, "limits": resources},
            "lifecycle": {"preStop": {"exec": {"command": ["/bin/sh", "-c", "ray stop"]}}},
            "volumeMounts": [*container["volumeMounts"], {"name": _SHARED_MEMORY["name"], "mountPath": "/dev/shm"}],
        }
    ]
    # Ray's sessions and logs are in /tmp.
    volumes = [each for each in spec["volumes"] if each["name"] != "tmp"]
    spec["volumes"] = [*volumes, {"name": "tmp", "emptyDir": {"sizeLimit": "2Gi"}}, _SHARED_MEMORY]
    return spec
