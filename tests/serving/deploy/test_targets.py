"""The folders that `deploy` writes, replaces and leaves alone, and those for Triton and TensorFlow Serving."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from serving.bundle import open_bundle
from serving.cli import run
from tests.serving.deploy.test_cluster import deploy
from tests.tiny_build import Fails, contents


@pytest.mark.parametrize("target", ["kubernetes", "triton"])
def test_deploying_again_replaces_what_deploy_wrote_and_nothing_else(
    real_bundle: Path, tmp_path: Path, fails: Fails, target: str
) -> None:
    folder = deploy(real_bundle, tmp_path / "here", target)
    before = contents(folder)
    assert contents(deploy(real_bundle, folder, target)) == before
    command = ["deploy", str(real_bundle), "--target", target, "--output", str(folder)]
    (folder / "mine.yaml").write_text("a: 1\n")
    fails(command, 2, "mine.yaml is not as deploy wrote it")
    (folder / "mine.yaml").unlink()
    edited = folder / "README.md"
    edited.write_text(edited.read_text() + "mine\n")
    kept = contents(folder)
    fails(command, 2, "README.md is not as deploy wrote it")
    assert contents(folder) == kept and [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_folder_of_another_target_or_of_strangers_is_left_alone(
    real_bundle: Path, tmp_path: Path, fails: Fails
) -> None:
    folder = deploy(real_bundle, tmp_path / "here", "compose")
    kept = contents(folder)
    for target in ("kubernetes", "tfserving"):
        arguments = ["deploy", str(real_bundle), "--target", target, "--output", str(folder)]
        fails(arguments, 2, "holds a compose deployment of 'bytes'")
    (strangers := tmp_path / "strangers").mkdir()
    (strangers / "a").write_text("b")
    for target in ("compose", "kubernetes", "kserve", "triton"):
        fails(
            ["deploy", str(real_bundle), "--target", target, "--output", str(strangers)], 2, "holds files that are not"
        )
    assert contents(folder) == kept and contents(strangers) == {"a": b"b"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target", "swarm"], "'swarm' is not one of"),
        (["--target", "kubernetes", "--memory-limit", "64MiB"], "needs about"),
        (["--target", "compose", "--graph", "ort/int9"], "no graph 'ort/int9'"),
        (["--target", "compose", "--graph", "savedmodel/prefill"], "choose one of ort/"),
        (["--target", "compose", "--replicas", "3"], "--replicas is for the target kubernetes, kserve and ray"),
        (["--target", "triton", "--cpus", "3"], "--cpus is for the target"),
        (["--cpus", "3"], "--cpus is for the target"),
        (["--target", "kubernetes", "--threads", "3"], "--threads is for the target tfserving"),
        (["--target", "kubernetes", "--image", "a b"], "write an image"),
        (["--target", "kubernetes", "--namespace", "A_b"], "write a namespace"),
        (["--target", "kubernetes", "--prometheus-url", "here"], "write a URL"),
        (["--target", "kubernetes", "--replicas", "9"], "--max-replicas is 8"),
    ],
)
def test_wrong_options_end_in_one_line_and_change_nothing(
    real_bundle: Path, tmp_path: Path, fails: Fails, options: list[str], words: str
) -> None:
    fails(["deploy", str(real_bundle), *options, "--output", str(tmp_path / "here")], 2, words)
    assert not list(tmp_path.iterdir())


def test_a_folder_within_the_bundle_or_a_compose_path_with_signs_is_refused(
    real_bundle: Path, tmp_path: Path, fails: Fails
) -> None:
    for target in ("compose", "kubernetes", "kserve", "triton"):
        inside = ["deploy", str(real_bundle), "--target", target, "--output", str(real_bundle / "here")]
        fails(inside, 2, "lies inside the bundle")
    shutil.copytree(real_bundle, odd := tmp_path / "a$b")
    fails(["deploy", str(odd), "--target", "compose", "--output", str(tmp_path / "o")], 2, "has characters")


def test_triton_gets_models_that_its_protobuf_reads(real_bundle: Path, tmp_path: Path) -> None:
    folder = deploy(real_bundle, tmp_path / "here", "triton") / "models"
    bundle = open_bundle(real_bundle)
    graphs = {"bytes_onnx": "onnx/portable", "bytes": "savedmodel/serving_default"}
    platforms = {"bytes_onnx": "onnxruntime_onnx", "bytes": "tensorflow_savedmodel"}
    assert {path.name for path in folder.iterdir()} == graphs.keys()
    for name, graph in graphs.items():
        config = text_format.Parse((folder / name / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
        assert (config.name, config.platform, config.max_batch_size) == (name, platforms[name], 0)
        for tensors, specs in (
            (config.input, bundle.graph(graph).inputs),
            (config.output, bundle.graph(graph).outputs),
        ):
            assert [tensor.name for tensor in tensors] == list(specs)
            for tensor in tensors:
                spec = specs[tensor.name]
                assert list(tensor.dims) == [size if isinstance(size, int) else -1 for size in spec.shape]
                kind = model_config_pb2.DataType.Name(tensor.data_type)
                assert kind == {"int64": "TYPE_INT64", "int32": "TYPE_INT32", "float32": "TYPE_FP32"}[spec.dtype]
    assert config.parameters["TF_SIGNATURE_DEF"].string_value == "serving_default"
    assert contents(folder / "bytes_onnx/1") == contents(real_bundle / "onnx")
    assert contents(folder / "bytes/1/model.savedmodel") == contents(real_bundle / "savedmodel/1")


def test_tritons_onnx_model_runs_where_it_was_copied(real_bundle: Path, tmp_path: Path) -> None:
    import numpy as np
    import onnxruntime

    folder = deploy(real_bundle, tmp_path / "here", "triton") / "models/bytes_onnx"
    config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    session = onnxruntime.InferenceSession(folder / "1/model.onnx")
    assert [each.name for each in session.get_inputs()] == [each.name for each in config.input]
    assert [each.name for each in session.get_outputs()] == [each.name for each in config.output]
    kinds = {"TYPE_INT64": np.int64, "TYPE_FP32": np.float32}
    feeds = {}
    for tensor in config.input:
        past = tensor.name.startswith("past")
        shape = [2 if at == 0 else (0 if past else 3) if size == -1 else size for at, size in enumerate(tensor.dims)]
        feeds[tensor.name] = np.ones(shape, kinds[model_config_pb2.DataType.Name(tensor.data_type)])
    feeds["position_ids"] = np.tile(np.arange(3), (2, 1))
    assert session.run(["logits"], feeds)[0].shape == (2, 3, 257)


def test_the_default_target_stays_tensorflow_serving(real_bundle: Path, tmp_path: Path) -> None:
    assert run(["deploy", str(real_bundle), "--output", str(tmp_path / "one")]) == 0
    assert run(["deploy", str(real_bundle), "--target", "tfserving", "--output", str(tmp_path / "two")]) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert (tmp_path / "one/compose.yaml").exists()
