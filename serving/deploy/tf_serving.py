"""A folder that serves a bundle by TensorFlow Serving: its container, or its binary."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from serving.bundle import Bundle, Geometry
from serving.bundle.examples import example_prompts, shell_quoted
from serving.bundle.publishing import check_destination, publish
from serving.bundle.strict_json import loads, read
from serving.deploy.tf_serving_config import BATCHING, MODELS, POLL_SECONDS, ServerOptions, config_files
from serving.deploy.versions import add_version, digest, prune, saved_model_files, versions_in
from serving.errors import BundleError, InputError, RuntimeMissingError

MARKER = "deployment.json"
# The official image's tags are TensorFlow Serving's versions; GPU ones end in -gpu.
IMAGE_VERSION = "2.21.0"
# Versions of the model that stay in the folder: what is served, and what was served before it.
KEEP = 2
_SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Deployment:
    """What a deployment says of itself in MARKER.

    `model` is the model's folder, relative to the deployment; `versions` the digest of each version that was copied.
    """

    schema_version: int
    target: Literal["tfserving"]
    name: str
    image_version: str
    model: str
    geometry: Geometry
    versions: dict[str, str]


@dataclass(frozen=True)
class Deployed:
    """What `write_tf_serving` did: `version` is the newest one, `added` whether it is new, `kept` whether the folder
    went on being the one that a running server sees, `removed` the versions that are gone."""

    folder: Path
    version: int
    added: bool
    kept: bool
    removed: tuple[int, ...] = ()


def read_deployment(folder: Path) -> Deployment:
    """What the deployment in `folder` says of itself. Raises BundleError for what this version has not written."""
    path = folder / MARKER
    value = loads(path.read_bytes(), str(path))
    if isinstance(value, dict) and value.get("schema_version") != _SCHEMA_VERSION:
        raise BundleError(f"{path}: not of this version of gpt2-bundle; deploy the bundle again")
    return read(Deployment, value, str(path))


def write_tf_serving(
    bundle: Bundle,
    destination: Path,
    options: ServerOptions,
    *,
    image_version: str = IMAGE_VERSION,
    copy: bool = True,
    keep: int = KEEP,
) -> Deployed:
    """Write the deployment of `bundle` to `destination`.

    A new folder appears in one rename. In a deployment of the same model with a copy, the SavedModel becomes the next
    version next to the old ones, of which `keep` stay, and a running server loads it; an equal SavedModel adds none.
    Without `copy` the SavedModel is mounted from the bundle by its relative path. Raises InputError for an
    `image_version` that is not a tensorflow/serving tag and for a folder that holds anything but a deployment of this
    model, and BundleError for a bundle without a SavedModel, or with one that is not an export of this project.
    """
    name = bundle.manifest.name
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", image_version) or image_version.endswith("-gpu"):
        raise InputError(
            f"{image_version!r} is not a version of the image tensorflow/serving; write it as {IMAGE_VERSION}"
        )
    files = saved_model_files(bundle)
    _look_into(bundle.folder / "savedmodel" / "1")
    final = Path(os.path.realpath(destination))
    if final.is_relative_to(os.path.realpath(bundle.folder)):
        raise InputError(f"{destination}: lies inside the bundle, which may hold nothing more; choose another folder")
    model = f"models/{name}" if copy else os.path.relpath(os.path.realpath(bundle.folder / "savedmodel"), final)
    if not copy and not re.fullmatch(r"[\w./ -]+", model):
        raise InputError(f"{model!r} has characters that a compose file would read otherwise; leave out --no-copy")
    check_destination(destination, MARKER)
    old = _old(final, name)
    options = dataclasses.replace(options, matmul_parts=_matmul_parts(bundle))
    versions = {"1": digest(files)} if copy else {}
    record = Deployment(_SCHEMA_VERSION, "tfserving", name, image_version, model, bundle.manifest.model, versions)
    if copy and old is not None and old.model == model:
        return _add(bundle, final, record, old, options, keep)
    staged = final.parent / f".{final.name}.new-{secrets.token_hex(4)}"
    try:
        staged.mkdir()
        if copy:
            add_version(bundle, files, staged / model, 1)
        _write_files(bundle, staged, record, options)
        return Deployed(publish(staged, destination, MARKER), 1, added=True, kept=False)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _look_into(version: Path) -> None:
    try:
        from serving.protobuf.saved_model_ops import check_saved_model
    except ImportError as error:
        raise RuntimeMissingError(
            f"looking into a SavedModel needs {error.name}, which is not installed; pip install 'gpt2-bundle[client]'"
        ) from None
    check_saved_model(version)


def _old(final: Path, name: str) -> Deployment | None:
    """The deployment that is there; None if there is none, or one that an older version wrote."""
    if not (final / MARKER).is_file():
        return None
    try:
        old = read_deployment(final)
    except BundleError:
        return None
    if old.name != name:
        raise InputError(f"{final}: serves the model {old.name!r}, and this bundle is {name!r}; choose another folder")
    return old


def _add(
    bundle: Bundle, final: Path, record: Deployment, old: Deployment, options: ServerOptions, keep: int
) -> Deployed:
    """Put the SavedModel into the deployment at `final`, whose folders a running server looks at."""
    files, model = saved_model_files(bundle), final / record.model
    there = versions_in(model)
    newest = there[-1] if there else 0
    added = not there or old.versions.get(str(newest)) != digest(files)
    version = newest + added
    if added:
        add_version(bundle, files, model, version)
    removed = prune(model, keep)
    digests = old.versions | {str(version): digest(files)}
    left = {str(number) for number in versions_in(model)}
    versions = {number: each for number, each in digests.items() if number in left}
    _write_files(bundle, final, dataclasses.replace(record, versions=versions), options)
    return Deployed(final, version, added, kept=True, removed=tuple(removed))


def _matmul_parts(bundle: Bundle) -> int:
    exported = bundle.manifest.provenance.recipe.get("export")
    parts = exported.get("matmul_parts", 1) if isinstance(exported, dict) else 1
    return parts if isinstance(parts, int) and parts > 1 else 1


def _write_files(bundle: Bundle, folder: Path, record: Deployment, options: ServerOptions) -> None:
    """Everything but the model; each file is replaced in one step, the record last."""
    name, model, version = record.name, record.model, record.image_version
    configuration = config_files(name, batching=options.batching)
    files = {f"config/{file}": text for file, text in configuration.items()} | {
        "compose.yaml": _compose(name, model, version, options),
        "compose.gpu.yaml": _gpu(version),
        "run.sh": _script(name, model, options),
        "README.md": _readme(name, shell_quoted(example_prompts(bundle.folder)[0])),
        MARKER: json.dumps(dataclasses.asdict(record)) + "\n",
    }
    (folder / "config").mkdir(exist_ok=True)
    if BATCHING not in configuration:
        (folder / "config" / BATCHING).unlink(missing_ok=True)
    for file, text in files.items():
        target = folder / file
        staged = target.with_name(f".{target.name}.new")
        staged.write_text(text, encoding="utf-8")
        if file == "run.sh":
            staged.chmod(0o755)
        staged.replace(target)


def _compose(name: str, model: str, version: str, options: ServerOptions) -> str:
    flags = [
        "--port=8500",
        "--rest_api_port=8501",
        f"--model_config_file=/config/{MODELS}",
        *options.flags("/config"),
    ]
    listed = "\n".join(f'      - "{flag}"' for flag in flags)
    return f"""services:
  tf-serving:
    image: tensorflow/serving:{version}
    entrypoint: ["tensorflow_model_server"]
    command:
{listed}
    ports:
      - "127.0.0.1:8500:8500"
      - "127.0.0.1:8501:8501"
    volumes:
      - type: bind
        source: "./{model}"
        target: /models/{name}
        read_only: true
      - type: bind
        source: ./config
        target: /config
        read_only: true
    restart: unless-stopped
"""


def _gpu(version: str) -> str:
    return f"""services:
  tf-serving:
    image: tensorflow/serving:{version}-gpu
    deploy:
      resources:
        reservations:
          devices:
            - driver: nvidia
              count: 1
              capabilities: [gpu]
"""


def _script(name: str, model: str, options: ServerOptions) -> str:
    listed = " \\\n  ".join(f'"{flag}"' for flag in options.flags("$here/config"))
    return f"""#!/bin/sh
# Serve {name} by the tensorflow_model_server on PATH or in TENSORFLOW_MODEL_SERVER; further flags are passed on.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
server=${{TENSORFLOW_MODEL_SERVER:-tensorflow_model_server}}
if ! command -v "$server" >/dev/null 2>&1; then
  echo "error: no $server here; install it, set TENSORFLOW_MODEL_SERVER, or use 'docker compose up'" >&2
  exit 1
fi
exec "$server" \\
  --port=8500 --rest_api_port=8501 \\
  "--model_name={name}" "--model_base_path=$here/{model}" \\
  {listed} \\
  "$@"
"""


def _readme(name: str, prompt: str) -> str:
    return f"""# {name} on TensorFlow Serving

    docker compose up                                             # CPU, the official container
    docker compose -f compose.yaml -f compose.gpu.yaml up         # one NVIDIA GPU
    ./run.sh                                                      # a tensorflow_model_server of your own

REST is on port 8501, gRPC on 8500 (the container's on this machine only), metrics on
http://127.0.0.1:8501/monitoring/prometheus/metrics. `config/` has the server's model and monitoring files.

    gpt2-bundle client status --url http://127.0.0.1:8501 --model {name}
    gpt2-bundle client generate "Return the" --url http://127.0.0.1:8501 --model {name}

`models/{name}/` holds the versions. Deploy a bundle of this name to this folder again and its SavedModel becomes the
next version: a running server loads it within {POLL_SECONDS} seconds and then unloads the old one. To go back, remove
the newest version.
"""
