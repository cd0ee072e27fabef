"""The targets that `gpt2-bundle serve` or Triton run: what each one's folder holds, and how it is started."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from serving.bundle import Bundle
from serving.deploy.compose import compose_file
from serving.deploy.endpoints import HTTP, KEYS_VARIABLE, markdown_table
from serving.deploy.folder import bundle_from, write_folder
from serving.deploy.kserve import kserve_manifests
from serving.deploy.kubernetes import OPTIONAL, kustomization, manifests
from serving.deploy.ray_serve import ray_image, ray_manifests, serve_config
from serving.deploy.triton import repository
from serving.deploy.workload import BUNDLES, Workload
from serving.support.yaml_text import yaml_text

TARGETS = ("compose", "kubernetes", "kserve", "ray", "triton")
_HEAD = "Written by gpt2-bundle deploy. Change it by an overlay, or deploy again with other options."


@dataclass(frozen=True)
class Written:
    """A folder that was written, and what starts it."""

    folder: Path
    start: str


def write_target(bundle: Bundle, destination: Path, target: str, load: Workload | None) -> Written:
    """Write the folder of one of TARGETS; `load` is needed for all but Triton.

    Raises InputError for a folder that holds anything but such a deployment of this model, and BundleError.
    """
    if target == "triton" or load is None:
        texts, copies = repository(bundle)
        texts["README.md"] = _triton_readme(bundle.manifest.name)
        # The repository is a folder of its own, as Triton takes every folder in it for a model.
        texts = {path if path == "README.md" else f"models/{path}": text for path, text in texts.items()}
        copies = {f"models/{path}": source for path, source in copies.items()}
        folder = write_folder(bundle, destination, target, texts, copies)
        return Written(folder, "tritonserver --model-repository=models")
    if target == "compose":
        documents, start = {"compose.yaml": compose_file(load, bundle_from(destination, bundle))}, "docker compose up"
    elif target == "ray":
        documents = {
            "serve.yaml": serve_config(load, os.path.realpath(bundle.folder), "127.0.0.1", check_resources=True),
            **ray_manifests(load),
        }
        start = "serve run serve.yaml"
    else:
        documents = kserve_manifests(load) if target == "kserve" else manifests(load)
        documents["kustomization.yaml"] = kustomization(documents)
        start = "kubectl apply -k ."
    texts = {path: yaml_text([each], _HEAD) for path, each in documents.items()}
    texts["README.md"] = _ray_readme(load, start) if target == "ray" else _readme(load, target, start)
    if target != "compose" and load.options.bundle_source != "pvc":
        texts["bundle.Dockerfile"] = _bundle_dockerfile(load)
    return Written(write_folder(bundle, destination, target, texts), start)


def _bundle_dockerfile(load: Workload) -> str:
    if load.options.bundle_source == "image":
        return "# An image volume: the bundle is the root of the image.\nFROM scratch\nCOPY . /\n"
    return "# The init container copies /bundle to the pod.\nFROM busybox:1.37\nCOPY . /bundle\n"


def _readme(load: Workload, target: str, start: str) -> str:
    options = load.options
    dockerfile = f"docker/{options.device}.Dockerfile"
    lines = [
        f"# {load.model} on {target}",
        "",
        f"The server's image is not published. Build it in a checkout of the project, as `{load.image}`:",
        "",
        f"    docker build -f {dockerfile} -t {load.image} .",
        "",
    ]
    if target == "compose":
        lines += [
            f"Then start it here. Without API keys in {KEYS_VARIABLE}, every program of this machine may ask it.",
            "",
            f"    {start}",
            f"    curl http://127.0.0.1:{HTTP.number}/health/ready",
        ]
    else:
        lines += _cluster_lines(load, target, start)
    need = load.needed_bytes >> 20
    lines += [
        "",
        f"Memory: {load.memory_mib} MiB. The bundle needs {need} MiB at most: {load.engine_bytes >> 20} MiB for",
        f"weights (twice their file, as while it loads), KV cache and logits of {options.max_num_seqs} sequences;",
        f"the rest for the process and request bodies. Processors: {options.cpus}, one for each thread of the runtime.",
        f"A server that is stopped drains for {options.drain_timeout:g} s at most.",
        "",
        markdown_table(),
        "",
        "These files were checked against the published schemas. No container engine and no cluster has run them.",
    ]
    return "\n".join(lines) + "\n"


def _cluster_lines(load: Workload, target: str, start: str) -> list[str]:
    space = f" -n {load.options.namespace}" if load.options.namespace else ""
    source = load.options.bundle_source
    secret = f"kubectl create secret generic {load.label}-api-keys{space} --from-literal=keys=$(openssl rand -hex 24)"
    lines = ["Push it to a registry that the cluster reads, and name it there by `--image`. Then:", "", f"    {secret}"]
    lines += [
        *_bundle_lines(load),
        f"    {start}",
        "",
        f"Apply from `{OPTIONAL}/` what the cluster has operators for:",
        "",
    ]
    if target == "kubernetes":
        lines += [
            "- `keda.yaml` scales on the queue by KEDA, and `hpa.yaml` by a HorizontalPodAutoscaler, which takes the",
            "  metric from prometheus-adapter (`prometheus-adapter-values.yaml`, for its Helm chart). Apply one of",
            "  the two, and remove `replicas` from the Deployment by an overlay: else each apply sets it back.",
        ]
    monitor = "service-monitor" if target == "kubernetes" else "pod-monitor"
    lines += [
        f"- `{monitor}.yaml` has the Prometheus operator scrape the pods; `grafana-dashboard.yaml` is the dashboard.",
        "",
        "The network policy lets in pods of the same namespace, and the namespace `monitoring` to the HTTP port. Add",
        "the namespace of your ingress by an overlay. The server itself may reach nothing.",
    ]
    if source == "pvc":
        lines += ["The claim is ReadWriteMany. Without such storage, deploy with `--bundle-source image` or `init`."]
    elif source == "image":
        lines += ["Image volumes need the feature ImageVolume, on by default from Kubernetes 1.35."]
    return lines


def _bundle_lines(load: Workload) -> list[str]:
    """The commands that bring the bundle to where the pods read it."""
    if load.options.bundle_source != "pvc":
        return [f"    docker build -f bundle.Dockerfile -t {load.bundle_image} BUNDLE    # push it too"]
    space = f" -n {load.options.namespace}" if load.options.namespace else ""
    folder, loader = f"{BUNDLES}/{load.model}", f"{load.label}-loader"
    return [
        "    kubectl apply -f bundle-claim.yaml -f optional/bundle-loader.yaml",
        f"    kubectl cp{space} BUNDLE {loader}:{folder}.new    # BUNDLE is the bundle's folder",
        f"    kubectl exec{space} {loader} -- mv -T {folder}.new {folder}",
        f"    kubectl delete pod{space} {loader}",
    ]


def _ray_readme(load: Workload, start: str) -> str:
    space = f" -n {load.options.namespace}" if load.options.namespace else ""
    image, manifest = ray_image(load), "ray-service.yaml"
    keys = f"kubectl create secret generic {load.label}-api-keys{space} --from-literal=keys=$(openssl rand -hex 24)"
    options = load.options
    lines = [
        f"# {load.model} on Ray Serve",
        "",
        "On this machine, or on a Ray cluster of which each node has the bundle at the folder that `serve.yaml` names:",
        "",
        "    pip install 'gpt2-bundle[serve,onnx,ray]'    # on each node",
        "    ray start --head",
        f"    {start}",
        f"    curl http://127.0.0.1:{HTTP.number}/v1/models",
        "",
        f"In Kubernetes, by KubeRay and `{manifest}`. The image is not published. Build it in a checkout of",
        "the project, push it to a registry that the cluster reads, and name it there by `--image`.",
        "",
        f"    docker build -f docker/ray.Dockerfile -t {image} .",
        f"    {keys}",
        *_bundle_lines(load),
        f"    kubectl apply -f {manifest}",
        "",
        f"Each replica reserves {options.cpus} processors and {load.memory_mib} MiB. There are {options.replicas} to",
        f"{options.max_replicas} replicas; with `--replicas 0` the last one stops when it is idle.",
        "",
        "The manifest was checked against KubeRay's schema. No Kubernetes cluster has run it.",
    ]
    if options.device == "cuda":
        lines += ["The Dockerfile has ONNX Runtime for processors; build an image of your own for CUDA."]
    return "\n".join(lines) + "\n"


def _triton_readme(name: str) -> str:
    return f"""# {name} on Triton

    tritonserver --model-repository=models

| model | backend | what it does |
|---|---|---|
| `{name}_onnx` | ONNX Runtime | one step: token ids and past KV cache in, logits and present KV cache out |
| `{name}` | TensorFlow | a whole generation, by the SavedModel's signature |

A model is there if the bundle has its graph. Triton's images have the TensorFlow backend up to 25.02. On a newer one,
add `--model-control-mode=explicit --load-model={name}_onnx`, or the server does not start.
Triton has no backend for the optimized graphs (`ort/`) with a shared KV cache, and its batching is off: rows of a call
are the caller's. For text, streaming and continuous batching by Triton's own protocol use `gpt2-bundle serve`, which
answers Triton's clients at `/v2` and by gRPC.

The configuration was checked against Triton's protobuf. No Triton has run it.
"""
