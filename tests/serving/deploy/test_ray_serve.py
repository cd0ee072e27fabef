"""The Ray target: a configuration that the application takes, and a RayService whose pods hold a replica."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from serving.deploy.endpoints import KEYS_VARIABLE
from serving.deploy.ray_serve import APPLICATION
from serving.ray.options import check_bundle, check_nodes, read_options
from tests.serving.deploy.test_cluster import KUBERNETES, deploy, documents, restricted
from tests.tiny_build import Fails

MIB = 1 << 20


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_application_takes_the_configuration(real_bundle: Path, tmp_path: Path, device: str) -> None:
    more = ["--device", device, "--replicas", "0", "--max-replicas", "5", "--max-num-seqs", "6", "--cpus", "3"]
    found = documents(deploy(real_bundle, tmp_path / "here", "ray", *more))["serve.yaml"]
    assert found["http_options"]["host"] == "127.0.0.1"
    (application,) = found["applications"]
    module, _, name = APPLICATION.partition(":")
    assert application["import_path"] == APPLICATION
    assert f"def {name}(" in Path(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
    options = read_options(application["args"])
    assert (options.min_replicas, options.max_replicas, options.cpus, options.gpus) == (0, 5, 3, device == "cuda")
    asked = options.serve_options()
    assert (asked["max_num_seqs"], asked["threads"], asked["device"]) == (6, 3, (device,))
    # The reserved memory is what the application itself asks for.
    assert check_bundle(options) == options.memory


@pytest.mark.parametrize("source", ["pvc", "image", "init"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_pod_of_the_ray_service_holds_a_replica(real_bundle: Path, tmp_path: Path, device: str, source: str) -> None:
    more = ["--device", device, "--bundle-source", source, "--namespace", "models", "--replicas", "3"]
    folder = deploy(real_bundle, tmp_path / "here", "ray", *more)
    service = documents(folder)["ray-service.yaml"]
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    options = read_options(application["args"])
    assert not options.check_resources and options.bundle == "/bundles/bytes"
    cluster = service["spec"]["rayClusterConfig"]
    (group,) = cluster["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (options.min_replicas, options.max_replicas)
    head, worker = cluster["headGroupSpec"]["template"]["spec"], group["template"]["spec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for spec in (head, worker):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": service["metadata"], "spec": spec}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        # The head's autoscaler needs the account that other pods do without.
        restricted({"automountServiceAccountToken": False, **spec})
        assert spec["containers"][0]["env"][0]["name"] == KEYS_VARIABLE
    limits = worker["containers"][0]["resources"]["limits"]
    node = {"CPU": float(limits["cpu"]), "memory": float(limits["memory"].removesuffix("Mi")) * MIB}
    check_nodes(options.need(), [node | {"GPU": float(limits.get("nvidia.com/gpu", 0))}])
    assert (folder / "bundle-claim.yaml").exists() == (source == "pvc")
    assert (folder / "bundle.Dockerfile").exists() == (source != "pvc")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "kubectl apply -f ray-service.yaml" in text and head["containers"][0]["image"] in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target", "ray", "--prometheus-url", "http://a"], "--prometheus-url is for the target"),
        (["--target", "ray", "--max-replicas", "1"], "--max-replicas is 1"),
        (["--target", "kubernetes", "--replicas", "0"], "only the target ray"),
    ],
)
def test_wrong_options_end_in_one_line(
    real_bundle: Path, tmp_path: Path, fails: Fails, options: list[Any], words: str
) -> None:
    fails(["deploy", str(real_bundle), *options, "--output", str(tmp_path / "here")], 2, words)
    assert not list(tmp_path.iterdir())
