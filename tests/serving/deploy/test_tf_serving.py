"""Deployments: files that mean what they say, one rename, and nobody else's folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from serving.bundle import open_bundle
from serving.cli import run
from serving.deploy import tf_serving as deploying
from serving.deploy.tf_serving_config import config_files
from serving.errors import BundleError
from tests.tiny_build import Fails, contents

SERVER = """#!/bin/sh
for argument in "$@"; do printf '%s\\n' "$argument"; done
"""


def deploy(bundle: Path, output: Path, *more: str) -> Path:
    assert run(["deploy", str(bundle), "--target", "tfserving", "--output", str(output), *more]) == 0
    return output


def test_a_deployment_holds_the_model_and_what_runs_it(real_bundle: Path, tmp_path: Path) -> None:
    folder = deploy(real_bundle, tmp_path / "here", "--image-version", "2.18.0", "--rest-timeout", "90")
    assert contents(folder / "models/bytes") == contents(real_bundle / "savedmodel")
    assert contents(folder / "config") == {name: text.encode() for name, text in config_files("bytes").items()}

    service = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["tf-serving"]
    assert service["image"] == "tensorflow/serving:2.18.0"
    assert "--rest_api_timeout_in_ms=90000" in service["command"]
    mounts = {volume["target"]: volume["source"] for volume in service["volumes"]}
    # The configuration's base_path is where the model is mounted, and every file of a flag is there.
    assert 'base_path: "/models/bytes"' in (folder / "config/models.config").read_text()
    assert (folder / mounts["/models/bytes"] / "1/saved_model.pb").is_file()
    for flag in service["command"]:
        place = flag.partition("=")[2]
        if place.startswith("/config/"):
            assert (folder / mounts["/config"] / place.removeprefix("/config/")).is_file(), flag
    gpu = yaml.safe_load((folder / "compose.gpu.yaml").read_text())["services"]["tf-serving"]
    assert gpu["image"] == "tensorflow/serving:2.18.0-gpu"
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_the_script_finds_the_binary_and_gives_it_absolute_paths(real_bundle: Path, tmp_path: Path) -> None:
    folder = deploy(real_bundle, tmp_path / "with space")
    server = tmp_path / "server"
    server.write_text(SERVER)
    server.chmod(0o755)
    environment = os.environ | {"TENSORFLOW_MODEL_SERVER": str(server)}
    ran = subprocess.run([folder / "run.sh", "--own=1"], env=environment, capture_output=True, text=True, cwd="/")
    flags = dict(line.split("=", 1) for line in ran.stdout.splitlines())
    assert flags["--model_name"] == "bytes" and flags["--own"] == "1"
    assert (Path(flags["--model_base_path"]) / "1/saved_model.pb").is_file()
    assert all(Path(flags[name]).is_file() for name in ("--batching_parameters_file", "--monitoring_config_file"))

    environment["TENSORFLOW_MODEL_SERVER"] = "not-installed-here"
    ran = subprocess.run([folder / "run.sh"], env=environment, capture_output=True, text=True)
    assert ran.returncode == 1 and ran.stderr.count("\n") == 1 and "no not-installed-here here" in ran.stderr


def test_without_a_copy_the_bundles_model_is_mounted_by_a_relative_path(real_bundle: Path, tmp_path: Path) -> None:
    folder = deploy(real_bundle, tmp_path / "here", "--no-copy")
    assert not (folder / "models").exists()
    source = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["tf-serving"]["volumes"][0]["source"]
    assert source.startswith("./../") and (folder / source).resolve() == (real_bundle / "savedmodel").resolve()


def test_an_old_deployment_is_replaced_whole(
    real_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = deploy(real_bundle, tmp_path / "here")
    (folder / "models/bytes/1/stale").write_text("x")
    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(deploying, "_script", lambda *_: 1 / 0)
        assert run(["deploy", str(real_bundle), "--target", "tfserving", "--output", str(folder)]) == 1
    assert contents(folder) == before and [path.name for path in tmp_path.iterdir()] == ["here"]
    deploy(real_bundle, folder)
    assert not (folder / "models/bytes/1/stale").exists()
    assert json.loads((folder / "deployment.json").read_text())["target"] == "tfserving"


def test_what_is_refused(real_bundle: Path, tmp_path: Path, fails: Fails) -> None:
    command = ["deploy", str(real_bundle), "--target", "tfserving", "--output"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    fails([*command, str(tmp_path / "mine")], 2, "files that are not a deployment")
    fails([*command, str(real_bundle / "deploy")], 2, "lies inside the bundle")
    fails([*command, str(real_bundle.parent)], 2, "files that are not a deployment")
    for version in ("2.19; rm", "", "2.19-gpu"):
        fails([*command, str(tmp_path / "new"), "--image-version", version], 2, "no version of the image")
    fails([*command, str(tmp_path / "new"), "--rest-timeout", "nan"], 2, "'nan' is no number")
    fails(["deploy", str(real_bundle), "--target", "heroku"], 2, "heroku")
    opened = open_bundle(real_bundle, check="sizes")
    without = [item for item in opened.manifest.artifacts if not item.path.startswith("savedmodel/")]
    onnx_only = replace(opened, manifest=replace(opened.manifest, artifacts=tuple(without)))
    with pytest.raises(BundleError, match="no SavedModel"):
        deploying.write_tf_serving(onnx_only, tmp_path / "new", version="2.21.0", rest_timeout=30, copy=True)
    shutil.copytree(real_bundle, tmp_path / "a$b")
    fails(["deploy", str(tmp_path / "a$b"), "--target", "tfserving", "--output", str(tmp_path / "new"), "--no-copy"],
          2, "characters that a compose file would read otherwise")  # fmt: skip
    assert not (tmp_path / "new").exists()
