"""A folder that serves a bundle by TensorFlow Serving: its container, or its binary. Standard library only."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from pathlib import Path

from serving.bundle import Bundle
from serving.bundle.publish import check_destination, publish
from serving.deploy.tf_serving_config import BATCHING, MODELS, MONITORING, config_files
from serving.errors import BundleError, InputError

MARKER = "deployment.json"
# The official image's tags are TensorFlow Serving's versions; GPU ones end in -gpu.
IMAGE_VERSION = "2.21.0"
_SCHEMA_VERSION = 1


def write_tf_serving(bundle: Bundle, destination: Path, *, version: str, rest_timeout: float, copy: bool) -> Path:
    """Write the deployment of `bundle` to `destination` in one rename, and return the final folder.

    `version` is a tag of the image tensorflow/serving, `rest_timeout` seconds. Without `copy` the SavedModel is
    mounted from the bundle by its relative path. Raises InputError for a version that is no tag and for a folder that
    holds anything but a deployment, and BundleError if the bundle has no SavedModel.
    """
    name = bundle.manifest.name
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", version) or version.endswith("-gpu"):
        raise InputError(f"{version!r} is no version of the image tensorflow/serving; write it as {IMAGE_VERSION}")
    saved = bundle.folder / "savedmodel"
    files = [item.path for item in bundle.manifest.artifacts if item.path.startswith("savedmodel/")]
    if "savedmodel/1/saved_model.pb" not in files:
        raise BundleError(f"{bundle.folder}: the bundle has no SavedModel; build it again")
    final = Path(os.path.realpath(destination))
    if final.is_relative_to(os.path.realpath(bundle.folder)):
        raise InputError(f"{destination}: lies inside the bundle, which may hold nothing more; choose another folder")
    source = os.path.realpath(saved)
    model = f"models/{name}" if copy else os.path.relpath(source, final)
    if not copy and not re.fullmatch(r"[\w./ -]+", model):
        raise InputError(f"{model!r} has characters that a compose file would read otherwise; leave out --no-copy")
    check_destination(destination, MARKER)
    staged = final.parent / f".{final.name}.new-{secrets.token_hex(4)}"
    try:
        staged.mkdir()
        for file in files if copy else []:
            target = staged / "models" / name / file.removeprefix("savedmodel/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path(file), target)
        (staged / "config").mkdir()
        for file, text in config_files(name).items():
            (staged / "config" / file).write_text(text, encoding="utf-8")
        flags = [f"--rest_api_timeout_in_ms={int(rest_timeout * 1000)}", *_threads(bundle)]
        (staged / "compose.yaml").write_text(_compose(name, model, version, flags), encoding="utf-8")
        (staged / "compose.gpu.yaml").write_text(_gpu(version), encoding="utf-8")
        script = staged / "run.sh"
        script.write_text(_script(name, model, flags), encoding="utf-8")
        script.chmod(0o755)
        (staged / "README.md").write_text(_readme(name), encoding="utf-8")
        record = {"schema_version": _SCHEMA_VERSION, "target": "tfserving", "name": name, "image_version": version}
        (staged / MARKER).write_text(json.dumps(record) + "\n", encoding="utf-8")
        return publish(staged, destination, MARKER)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _threads(bundle: Bundle) -> list[str]:
    """Thread pools for a model whose matrices are in parts, an op a thread; else they are left to the server."""
    exported = bundle.manifest.provenance.recipe.get("export")
    parts = exported.get("matmul_parts", 1) if isinstance(exported, dict) else 1
    if not isinstance(parts, int) or parts < 2:
        return []
    return ["--tensorflow_intra_op_parallelism=1", f"--tensorflow_inter_op_parallelism={parts}"]


def _flags(config: str, more: list[str]) -> list[str]:
    """What container and binary have in common, and `more`."""
    return [
        "--enable_batching=true",
        f"--batching_parameters_file={config}/{BATCHING}",
        f"--monitoring_config_file={config}/{MONITORING}",
        *more,
    ]


def _compose(name: str, model: str, version: str, more: list[str]) -> str:
    flags = [
        "--port=8500",
        "--rest_api_port=8501",
        f"--model_config_file=/config/{MODELS}",
        "--file_system_poll_wait_seconds=60",
        *_flags("/config", more),
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


def _script(name: str, model: str, more: list[str]) -> str:
    listed = " \\\n  ".join(f'"{flag}"' for flag in _flags("$here/config", more))
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
  --port=8500 --rest_api_port=8501 --file_system_poll_wait_seconds=60 \\
  "--model_name={name}" "--model_base_path=$here/{model}" \\
  {listed} \\
  "$@"
"""


def _readme(name: str) -> str:
    return f"""# {name} on TensorFlow Serving

    docker compose up                                             # CPU, the official container
    docker compose -f compose.yaml -f compose.gpu.yaml up         # one NVIDIA GPU
    ./run.sh                                                      # a tensorflow_model_server of your own

REST is on port 8501, gRPC on 8500 (the container's on this machine only), metrics on
http://127.0.0.1:8501/monitoring/prometheus/metrics. `config/` has the server's model, batching and monitoring files.

    gpt2-bundle client status --url http://127.0.0.1:8501 --model {name}
    gpt2-bundle client generate "Return the" --url http://127.0.0.1:8501 --model {name}
"""
