"""Deployments: files that mean what they say, one rename, and nobody else's folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

from serving.bundle import open_bundle, write_manifest
from serving.cli import run
from serving.deploy import tf_serving as deploying
from serving.deploy.tf_serving import read_deployment
from serving.deploy.tf_serving_config import ServerOptions, config_files
from serving.deploy.versions import add_version, prune, versions_in
from serving.errors import BundleError, InputError
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
    assert Path(flags["--monitoring_config_file"]).is_file()

    environment["TENSORFLOW_MODEL_SERVER"] = "not-installed-here"
    ran = subprocess.run([folder / "run.sh"], env=environment, capture_output=True, text=True)
    assert ran.returncode == 1 and ran.stderr.count("\n") == 1 and "no not-installed-here here" in ran.stderr


def test_without_a_copy_the_bundles_model_is_mounted_by_a_relative_path(real_bundle: Path, tmp_path: Path) -> None:
    folder = deploy(real_bundle, tmp_path / "here", "--no-copy")
    assert not (folder / "models").exists()
    source = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["tf-serving"]["volumes"][0]["source"]
    assert source.startswith("./../") and (folder / source).resolve() == (real_bundle / "savedmodel").resolve()


def changed(bundle: Path, folder: Path, note: bytes) -> Path:
    """A copy of `bundle` whose SavedModel differs, though not in what it does."""
    shutil.copytree(bundle, folder)
    path = folder / "savedmodel/1/saved_model.pb"
    saved = SavedModel.FromString(path.read_bytes())
    saved.meta_graphs[0].meta_info_def.tensorflow_git_version = note.decode()
    path.write_bytes(saved.SerializeToString())
    old = open_bundle(bundle, check="sizes").manifest
    write_manifest(
        folder, name="bytes", model=old.model, graphs=old.graphs, provenance=old.provenance, quality={}, parity={}
    )
    return folder


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.strip()


def test_a_served_folder_gets_the_next_version_and_loses_old_ones(
    real_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = deploy(real_bundle, tmp_path / "here")
    assert said(capsys).startswith("wrote ")
    seen = (folder / "models/bytes").stat().st_ino, (folder / "config").stat().st_ino, folder.stat().st_ino
    deploy(real_bundle, folder, "--rest-timeout", "90")
    assert "version 1" in (text := said(capsys)) and "is this SavedModel already" in text
    assert "--rest_api_timeout_in_ms=90000" in (folder / "run.sh").read_text()

    second = changed(real_bundle, tmp_path / "second", b"2")
    (folder / "models/bytes/.7.new-0123abcd").mkdir()
    assert run(["deploy", str(second), "--target", "tfserving", "--output", str(folder), "--json"]) == 0
    assert json.loads(said(capsys)) | {"folder": ""} == {
        "folder": "", "target": "tfserving", "name": "bytes", "version": 2, "added": True, "removed": []
    }  # fmt: skip
    assert sorted(path.name for path in (folder / "models/bytes").iterdir()) == ["1", "2"]
    assert contents(folder / "models/bytes/2") == contents(second / "savedmodel/1")
    # What a container has mounted, and what a server lists, are the folders that they were.
    assert seen == ((folder / "models/bytes").stat().st_ino, (folder / "config").stat().st_ino, folder.stat().st_ino)

    deploy(real_bundle, folder)
    assert "added version 3" in (text := said(capsys)) and text.endswith("removed version 1")
    assert versions_in(folder / "models/bytes") == [2, 3]
    assert set(read_deployment(folder).versions) == {"2", "3"}
    deploy(second, folder, "--keep-versions", "1")
    assert versions_in(folder / "models/bytes") == [4]

    # A run that fails leaves what is served.
    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(deploying, "_write_files", lambda *_: 1 / 0)
        assert run(["deploy", str(second), "--target", "tfserving", "--output", str(folder)]) == 1
    assert contents(folder) == before
    with pytest.raises(InputError, match="another program has just added version 4"):
        add_version(open_bundle(second), [], folder / "models/bytes", 4)


def test_versions_are_those_that_a_server_sees(tmp_path: Path) -> None:
    for name in ("1", "10", "9", "002", "x", ".3.new-0", "-4", "5.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "6").write_text("")
    assert versions_in(tmp_path) == [1, 2, 9, 10] and versions_in(tmp_path / "none") == []
    assert prune(tmp_path, 2) == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["-4", "10", "5.tmp", "6", "9", "x"]


def test_other_deployments_are_replaced_whole_and_that_is_said(
    real_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = deploy(real_bundle, tmp_path / "here")
    capsys.readouterr()
    deploy(real_bundle, folder, "--no-copy")
    assert "must be started again" in said(capsys) and not (folder / "models").exists()
    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(deploying, "_script", lambda *_: 1 / 0)
        assert run(["deploy", str(real_bundle), "--target", "tfserving", "--output", str(folder)]) == 1
    assert contents(folder) == before and [path.name for path in tmp_path.iterdir()] == ["here"]
    # One of the first form, which says less of itself.
    (folder / "deployment.json").write_text(
        '{"schema_version": 1, "target": "tfserving", "name": "bytes", "image_version": "2.20.0"}'
    )
    deploy(real_bundle, folder)
    assert versions_in(folder / "models/bytes") == [1]


def test_batching_by_the_server_is_asked_for(real_bundle: Path, tmp_path: Path) -> None:
    folder = deploy(real_bundle, tmp_path / "here")
    assert "batching" not in (folder / "run.sh").read_text() + (folder / "compose.yaml").read_text()
    assert "--rest_api_num_threads=64" in (folder / "run.sh").read_text()
    deploy(real_bundle, folder, "--server-batching", "--threads", "8")
    assert "--enable_batching=true" in (script := (folder / "run.sh").read_text()) and "_num_threads=8" in script
    text = (folder / "config/batching_parameters.txt").read_text()
    assert "a request of zero rows never ends" in text and "pad_variable_length_inputs: true" not in text
    deploy(real_bundle, folder)
    assert not (folder / "config/batching_parameters.txt").exists()


def test_without_protobuf_one_line_says_what_to_install(
    real_bundle: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "serving.protobuf.saved_model_ops", None)
    fails(["deploy", str(real_bundle), "--target", "tfserving", "--output", str(tmp_path / "new")], 1,
          "pip install 'gpt2-bundle[client]'")  # fmt: skip
    code = (
        "import sys; sys.modules['google.protobuf'] = None; import serving.commands.deploy, serving.deploy.tf_serving"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_refused(real_bundle: Path, tmp_path: Path, fails: Fails) -> None:
    command = ["deploy", str(real_bundle), "--target", "tfserving", "--output"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    fails([*command, str(tmp_path / "mine")], 2, "files that are not a deployment")
    fails([*command, str(real_bundle / "deploy")], 2, "lies inside the bundle")
    fails([*command, str(real_bundle.parent)], 2, "files that are not a deployment")
    for version in ("2.19; rm", "", "2.19-gpu"):
        fails([*command, str(tmp_path / "new"), "--image-version", version], 2, "not a version of the image")
    fails([*command, str(tmp_path / "new"), "--rest-timeout", "nan"], 2, "'nan' is not a number")
    fails(["deploy", str(real_bundle), "--target", "heroku"], 2, "heroku")
    opened = open_bundle(real_bundle, check="sizes")
    without = [item for item in opened.manifest.artifacts if not item.path.startswith("savedmodel/")]
    onnx_only = replace(opened, manifest=replace(opened.manifest, artifacts=tuple(without)))
    with pytest.raises(BundleError, match="no SavedModel"):
        deploying.write_tf_serving(onnx_only, tmp_path / "new", ServerOptions())
    other = shutil.copytree(real_bundle, tmp_path / "other")
    renamed = (other / "manifest.json").read_text().replace('"name": "bytes"', '"name": "other"')
    (other / "manifest.json").write_text(renamed)
    folder = deploy(real_bundle, tmp_path / "there")
    fails(["deploy", str(other), "--target", "tfserving", "--output", str(folder)], 2, "serves the model 'bytes'")
    shutil.copytree(real_bundle, tmp_path / "a$b")
    fails(["deploy", str(tmp_path / "a$b"), "--target", "tfserving", "--output", str(tmp_path / "new"), "--no-copy"],
          2, "characters that a compose file would read otherwise")  # fmt: skip
    assert not (tmp_path / "new").exists()
