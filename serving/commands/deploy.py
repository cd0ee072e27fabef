"""`gpt2-bundle deploy`: a folder that a server runs from."""

from __future__ import annotations

import hashlib
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from serving.commands.engine_options import with_options
from serving.commands.param_types import BundlePath, GraphName, Number, Seconds, Size
from serving.deploy.targets import TARGETS
from serving.deploy.tf_serving import IMAGE_VERSION, KEEP, Deployed
from serving.deploy.tf_serving_config import POLL_SECONDS, THREADS, ServerOptions
from serving.errors import InputError
from serving.support.json_line import json_line

if TYPE_CHECKING:
    from serving.bundle import Bundle
    from serving.deploy.workload import Workload

_PROMETHEUS = ("kubernetes", "kserve")
_CLUSTER = (*_PROMETHEUS, "ray")
_SERVED = ("compose", *_CLUSTER)
_TF_SERVING = [
    click.option("--image-version", default=IMAGE_VERSION, show_default=True, metavar="TAG",
                 help="Use this tag of the image tensorflow/serving."),
    click.option("--rest-timeout", type=Number(min=0.001, max=86_400), default=30.0, show_default=True,
                 metavar="SECONDS", help="Maximum time of a REST request on the server."),
    click.option("--threads", type=click.IntRange(1, 4096), default=THREADS, show_default=True,
                 help="Number of server threads, for REST and for gRPC each. A thread works on one request."),
    click.option("--keep-versions", type=click.IntRange(min=1), default=KEEP, show_default=True, metavar="N",
                 help="Number of model versions to keep in the folder; older ones are removed."),
    click.option("--server-batching", is_flag=True,
                 help="Let the server merge requests; config/batching_parameters.txt names the risks.  "
                      "[default: no merging]"),
    click.option("--no-copy", is_flag=True, help="Mount the SavedModel from the bundle.  [default: copy it]"),
]  # fmt: skip
_SERVE = [
    click.option("--graph", type=GraphName(), default="ort/fp32", show_default=True, metavar="NAME",
                 help="Serve this ONNX graph, by its name in the manifest."),
    click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]),
                 help="Run on processors, or on one GPU for each server."),
    click.option("--cpus", default=2, show_default=True, type=click.IntRange(1, 1024),
                 help="Number of processors, and of the runtime's threads, of a server."),
    click.option("--max-num-seqs", default=16, show_default=True, type=click.IntRange(1, 1024), metavar="N",
                 help="Maximum number of sequences that a server decodes concurrently."),
    click.option("--memory-limit", type=Size(), help="Memory of a server.  [default: what the bundle needs]"),
    click.option("--drain-timeout", default=30.0, show_default=True, type=Seconds(), metavar="SECONDS",
                 help="Time that accepted requests have to finish when a server is stopped."),
    click.option("--image", metavar="IMAGE",
                 help="Use this image of the server.  [default: gpt2-bundle-serve:VERSION-DEVICE]"),
]  # fmt: skip
_PODS = [
    click.option("--replicas", default=2, show_default=True, type=click.IntRange(0, 10_000),
                 help="Number of servers, and the autoscalers' minimum. Only ray can start from 0."),
    click.option("--max-replicas", default=8, show_default=True, type=click.IntRange(1, 10_000),
                 help="Maximum number of servers of the autoscalers."),
    click.option("--namespace", metavar="NAME", help="Put all objects into this namespace.  [default: kubectl's]"),
    click.option("--bundle-source", default="pvc", show_default=True, type=click.Choice(["pvc", "image", "init"]),
                 help="Mount the bundle from a volume claim or an image, or copy it by an init container."),
    click.option("--bundle-image", metavar="IMAGE",
                 help="Take the bundle from this image.  [default: NAME-bundle with a tag of its content]"),
    click.option("--prometheus-url", default="http://prometheus-operated.monitoring:9090", show_default=True,
                 metavar="URL", help="Let the autoscaler read the queue metric from this Prometheus."),
]  # fmt: skip
# Targets to the options that are theirs alone.
_ONLY: dict[tuple[str, ...], tuple[str, ...]] = {
    ("tfserving",): (
        "image_version", "rest_timeout", "threads", "keep_versions", "server_batching", "no_copy",
    ),
    _SERVED: ("graph", "device", "cpus", "max_num_seqs", "memory_limit", "drain_timeout", "image"),
    _CLUSTER: ("replicas", "max_replicas", "namespace", "bundle_source", "bundle_image"),
    _PROMETHEUS: ("prometheus_url",),
}  # fmt: skip
_FORMS = {
    "image": (
        r"[a-z0-9][a-z0-9._:/-]*(:[\w.-]+)?(@sha256:[0-9a-f]{64})?",
        "an image, such as registry.example/serve:1",
    ),
    "namespace": (r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", "a namespace: up to 63 of a-z, 0-9 and '-'"),
    "prometheus_url": (r"https?://[^\s\"']+", "a URL, such as http://prometheus.monitoring:9090"),
}
_FORMS["bundle_image"] = _FORMS["image"]


@click.command()
@click.argument("bundle", type=BundlePath())
@click.option("--target", type=click.Choice(["tfserving", *TARGETS]), default="tfserving", show_default=True,
              help="Write a folder for TensorFlow Serving, for this project's server, or for Triton.")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), metavar="FOLDER",
              help="Write the deployment to this folder.  [default: deploy/NAME-TARGET]")  # fmt: skip
@with_options([*_TF_SERVING, *_SERVE, *_PODS])
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.  [default: text]")
def deploy(bundle: Path, target: str, output: Path | None, as_json: bool, **options: Any) -> None:
    """Write a folder that serves BUNDLE.

    \b
    tfserving   TensorFlow Serving, by docker compose, on CPU or GPU, or by its binary
    compose     this project's server in a container of this machine
    kubernetes  this project's server in a cluster, with autoscaling and monitoring
    kserve      this project's server as a KServe InferenceService
    ray         this project's server as a Ray Serve application, with a RayService for KubeRay
    triton      a model repository of NVIDIA's Triton

    A TensorFlow Serving deployment of the same model in the folder gets the SavedModel as its next version, which a
    running server loads. Other targets replace what deploy wrote there. Any other folder with files in it is refused.

    The options from --image-version to --no-copy are for tfserving, those from --graph to --image for compose,
    kubernetes, kserve and ray, and those from --replicas to --bundle-image for kubernetes, kserve and ray.
    """
    from serving.bundle import open_bundle
    from serving.deploy.folder import check_target
    from serving.deploy.targets import write_target

    _check(target, options)
    opened = open_bundle(bundle)
    name = opened.manifest.name
    destination = output or Path("deploy") / f"{name}-{target}"
    if target == "tfserving":
        fresh = not (destination / "deployment.json").exists()
        check_target(destination, target, name)
        done = _tf_serving(opened, destination, options)
        version = {"version": done.version, "added": done.added, "removed": list(done.removed)}
        folder, said = done.folder, _said(done, fresh=fresh)
    else:
        load = _workload(opened, options) if target in _SERVED else None
        written = write_target(opened, destination, target, load)
        folder, version = written.folder, {}
        start = f"cd {shlex.quote(str(folder))} && {written.start}"
        said = f"wrote {folder}; README.md there says what must be built first, as nothing was; then: {start}"
    click.echo(json_line({"folder": str(folder), "target": target, "name": name, **version}) if as_json else said)


def _check(target: str, options: dict[str, Any]) -> None:
    """Raise InputError for an option of another target, and for a value that a manifest could not hold."""
    context = click.get_current_context()
    for targets, names in _ONLY.items():
        for name in names:
            if target not in targets and context.get_parameter_source(name) is not ParameterSource.DEFAULT:
                only = " and ".join(filter(None, [", ".join(targets[:-1]), targets[-1]]))
                raise InputError(f"--{name.replace('_', '-')} is for the target {only}; leave it out")
    for name, (form, what) in _FORMS.items():
        value = options[name]
        if value is not None and not re.fullmatch(form, value):
            raise InputError(f"--{name.replace('_', '-')} is {value!r}; write {what}")
    if not options["replicas"] and target != "ray":
        raise InputError("--replicas is 0, from which only the target ray starts servers; write 1 or more")
    if options["max_replicas"] < options["replicas"]:
        raise InputError(f"--max-replicas is {options['max_replicas']} and --replicas {options['replicas']}; raise it")


def _tf_serving(bundle: Bundle, destination: Path, options: dict[str, Any]) -> Deployed:
    from serving.deploy.tf_serving import write_tf_serving

    server = ServerOptions(options["rest_timeout"], options["threads"], options["server_batching"])
    return write_tf_serving(
        bundle,
        destination,
        server,
        image_version=options["image_version"],
        copy=not options["no_copy"],
        keep=options["keep_versions"],
    )


def _workload(bundle: Bundle, options: dict[str, Any]) -> Workload:
    from serving.bundle.manifest import MANIFEST_NAME
    from serving.deploy.workload import ServeOptions, Workload
    from serving.engine.config import EngineConfig, estimate_memory

    graph = bundle.graph(options["graph"])
    if graph.runtime != "onnx" or graph.cache != "shared-buffer":
        raise InputError(f"the server has no engine for the graph {options['graph']!r}; choose one of ort/")
    served = ServeOptions(**{name: options[name] for kind in (_SERVED, _CLUSTER, _PROMETHEUS) for name in _ONLY[kind]})
    memory = estimate_memory(bundle, served.graph, EngineConfig(slots=served.max_num_seqs)).total
    size = sum(artifact.size for artifact in bundle.manifest.artifacts)
    digest = hashlib.sha256((bundle.folder / MANIFEST_NAME).read_bytes()).hexdigest()
    return Workload(bundle.manifest.name, served, memory, size, digest)


def _said(done: Deployed, *, fresh: bool) -> str:
    place = shlex.quote(str(done.folder))
    start = f"start it with: cd {place} && docker compose up (or ./run.sh)"
    if not done.kept:
        again = "" if fresh else "a server that runs from it must be started again; "
        return f"wrote {done.folder}; {again}{start}"
    gone = f"; removed version {', '.join(map(str, done.removed))}" if done.removed else ""
    if done.added:
        return f"added version {done.version} to {done.folder}; a running server loads it within {POLL_SECONDS} s{gone}"
    same = f"version {done.version} in {done.folder} is this SavedModel already"
    return f"{same}; wrote the configuration, which a server reads when it starts{gone}"
