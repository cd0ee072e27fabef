"""Lint: silent on what this project exports, and loud on what a server could not serve."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builder.keras_backend import tf
from builder.tf_export.lint import Target, find_target, lint, read_meta_graph
from builder.tf_export.lint_costs import check_time, largest_batch, memory, parse_size, stored_bytes
from builder.tf_export.lint_graph import Finding, check_ops
from serving.bundle import Geometry, open_bundle
from serving.cli import run
from tests.oracles.fixtures import keras_model
from tests.tiny_build import Fails


def save(folder: Path, function: Callable[..., Any], *specs: Any, key: str = "serving_default") -> Path:
    module = tf.Module()
    module.function = tf.function(function, input_signature=specs)
    tf.saved_model.save(module, str(folder), signatures={key: module.function})
    return folder


def said(findings: list[Finding], level: str) -> dict[tuple[str, str], str]:
    return {(finding.check, finding.where): finding.message for finding in findings if finding.level == level}


GPT2 = Geometry(50257, 1024, 768, 12, 12, 3072, 1e-5, "gelu_new", 50256, 50256)
ROWS = tf.TensorSpec([None], tf.float32, name="value")
TOKENS = tf.TensorSpec([None, None], tf.int32, name="token_ids")


def test_a_bundle_has_no_errors_and_no_warnings(real_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["lint", str(real_bundle), "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["errors"] == record["warnings"] == 0
    # Measured, and compared with the context that the manifest says.
    (timeout,) = [finding for finding in record["findings"] if finding["check"] == "timeout"]
    assert timeout["message"].startswith("48 tokens at ")


def test_python_is_refused(tmp_path: Path, fails: Fails) -> None:
    def double(value: Any) -> Any:
        return {"doubled": tf.ensure_shape(tf.py_function(lambda each: 2 * each, [value], tf.float32), [None])}

    folder = save(tmp_path / "model", double, ROWS)
    fails(["lint", str(folder), "--no-measure"], 1, "EagerPyFunc calls Python")


def test_xla_is_refused(tmp_path: Path) -> None:
    inner = tf.function(lambda value: value * 2, jit_compile=True)
    folder = save(tmp_path / "model", lambda value: {"doubled": inner(value)}, ROWS)
    errors = said(lint(Target(folder)), "error")
    assert errors and all("jit_compile=True needs XLA" in message for message in errors.values())


def test_functions_that_no_session_reaches_are_not_judged(tmp_path: Path) -> None:
    module = tf.Module()
    module.other = tf.function(
        lambda value: tf.py_function(lambda each: each, [value], tf.float32), input_signature=[ROWS]
    )
    module.served = tf.function(lambda value: {"same": value}, input_signature=[ROWS])
    tf.saved_model.save(module, str(tmp_path / "model"), signatures={"serving_default": module.served})
    assert not said(lint(Target(tmp_path / "model")), "error")


def test_ops_outside_of_core_are_refused_but_for_those_of_libraries_that_the_server_links(tmp_path: Path) -> None:
    meta_graph = read_meta_graph(save(tmp_path / "model", lambda value: {"same": value}, ROWS))
    meta_graph.graph_def.node.add(name="a", op="SentencepieceOp")
    meta_graph.graph_def.node.add(name="b", op="TFText>FastSentencepieceTokenize")
    meta_graph.graph_def.node.add(name="e", op="FastBertNormalize")
    meta_graph.graph_def.node.add(name="f", op="SimpleMLInferenceOp")
    meta_graph.graph_def.node.add(name="c", op="OwnKernel")
    meta_graph.graph_def.node.add(name="d", op="Identity", device="/job:x/device:GPU:3")
    findings = list(check_ops(meta_graph))
    assert [finding.level for finding in findings] == ["note"] * 4 + ["error", "warning"]
    assert "OwnKernel is not a core TensorFlow op" in findings[4].message


@pytest.mark.parametrize(
    ("function", "specs", "where", "message"),
    [
        (lambda value: {"out": value}, [tf.TensorSpec(None, tf.float32, name="value")], "value", "unknown rank"),
        (lambda value: {"out": value}, [tf.TensorSpec([], tf.float32, name="value")], "value", "is a scalar"),
        (lambda value: {"out": value}, [tf.TensorSpec([4], tf.float32, name="value")], "value", "fixed at 4"),
        (lambda value: {"total": tf.reduce_sum(value)}, [ROWS], "total", "is a scalar"),
        (lambda token_ids: {"out": token_ids}, [TOKENS], "token_ids", "padding to merge requests changes"),
    ],
)
def test_shapes_that_cannot_be_merged(
    tmp_path: Path, function: Callable[..., Any], specs: list[Any], where: str, message: str
) -> None:
    errors = said(lint(Target(save(tmp_path / "model", function, *specs))), "error")
    assert any(place == f"serving_default.{where}" and message in text for (_, place), text in errors.items()), errors


def test_lengths_or_a_mask_make_padding_safe(tmp_path: Path) -> None:
    for name, spec in (
        ("lengths", tf.TensorSpec([None], tf.int32, name="lengths")),
        ("attention_mask", tf.TensorSpec([None, None], tf.int32, name="attention_mask")),
    ):
        folder = save(tmp_path / name, lambda token_ids, other: {"out": token_ids + tf.size(other)}, TOKENS, spec)
        assert not said(lint(Target(folder)), "error")


def test_names_that_nobody_gave(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", lambda value: value, tf.TensorSpec([None], tf.float32), key="embed")
    warnings = said(lint(Target(folder)), "warning")
    assert ("signatures", "embed.output_0") in warnings and "no serving_default" in warnings["signatures", "model"]
    assert not said(lint(Target(folder)), "error")


def test_a_signature_without_any_name(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", lambda value: {"same": value}, ROWS)
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    saved = SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    definitions = saved.meta_graphs[0].signature_def
    definitions[" "].CopyFrom(definitions["serving_default"])
    (folder / "saved_model.pb").write_bytes(saved.SerializeToString())
    assert "a signature without a name" in said(lint(Target(folder)), "error")["signatures", "model"]
    del definitions["serving_default"], definitions[" "]
    (folder / "saved_model.pb").write_bytes(saved.SerializeToString())
    assert "no signatures" in said(lint(Target(folder)), "error")["signatures", "model"]


def test_the_worst_case_against_the_rest_timeout(real_bundle: Path) -> None:
    assert check_time(26.0, 1024, 30.0).level == "note"
    late = check_time(57.0, 1024, 30.0)
    assert late.level == "warning" and "58.4 s" in late.message and "--rest_api_timeout_in_ms=87552" in late.message
    assert "at most 526 tokens" in late.message
    assert check_time(57.0, 1024, 60.0).level == "note"
    hopeless = check_time(1001.0, 8, 1.0)
    assert hopeless.level == "error" and "no request is answered" in hopeless.message


def test_the_timeout_is_an_option(real_bundle: Path, fails: Fails) -> None:
    command = ["lint", str(real_bundle), "--ms-per-token", "100"]
    assert run([*command, "--rest-timeout", "1"]) == 0, "a warning fails nothing"
    fails([*command, "--rest-timeout", "nan"], 2, "'nan' is not a number")
    fails([*command, "--ms-per-token", "inf"], 2, "'inf' is not a number")
    fails([*command, "--rest-timeout", "0.05"], 1, "one token takes 0.1 s, over the REST timeout of 0.05 s")


def test_the_largest_batch_is_the_served_one(tmp_path: Path, real_bundle: Path) -> None:
    version = tmp_path / "bundle/savedmodel/1"
    shutil.copytree(real_bundle / "savedmodel/1", version)
    assert largest_batch(version) == 16
    for place, text, rows in (
        (
            "bundle/deploy/tf_serving",
            "max_batch_size { value: 64 }\nallowed_batch_sizes: 4\nallowed_batch_sizes: 32\n",
            32,
        ),
        ("bundle/deploy/tf_serving", "max_batch_size { value: 64 }\n", 64),
    ):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / place / "batching_parameters.txt").write_text(text)
        assert largest_batch(version) == rows
        (note,) = [each for each in lint(Target(version, GPT2)) if each.check == "memory"]
        assert f"at batch {rows} and" in note.message
    deployed = tmp_path / "deployed/models/bytes/1"
    shutil.copytree(version, deployed)
    (tmp_path / "deployed/config").mkdir()
    (tmp_path / "deployed/config/batching_parameters.txt").write_text("allowed_batch_sizes: 2\n")
    assert largest_batch(deployed) == 2


def test_a_deployment_is_known_by_its_folder(
    real_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], fails: Fails
) -> None:
    folder = tmp_path / "here"
    for more in ([], ["--no-copy"]):
        assert run(["deploy", str(real_bundle), "--target", "tfserving", "--output", str(folder), *more]) == 0
        assert find_target(folder).geometry == open_bundle(real_bundle).manifest.model
        capfd.readouterr()
        assert run(["lint", str(folder), "--no-measure", "--json"]) == 0
        record = json.loads(capfd.readouterr().out.splitlines()[-1])
        assert record["warnings"] == 0 and record["savedmodel"].endswith("/1")
    (folder / "deployment.json").write_text('{"schema_version": 1}')
    fails(["lint", str(folder)], 1, "deploy the bundle again")


@pytest.mark.slow
def test_batching_by_the_server_is_a_warning(real_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    command = ["deploy", str(real_bundle), "--target", "tfserving", "--output", str(folder)]
    assert run([*command, "--server-batching"]) == 0

    def warned() -> list[str]:
        return [each.message for each in lint(find_target(folder)) if each.level == "warning"]

    (message,) = warned()
    assert "a request of zero rows never ends" in message and "fails all requests merged with it" in message
    path = folder / "config/batching_parameters.txt"
    path.write_text(path.read_text() + "pad_variable_length_inputs: true\n")
    assert any("ends the server process" in message for message in warned()) and len(warned()) == 2
    path.unlink()
    (message,) = warned()
    (folder / "run.sh").write_text("exec server --enable_batching=false\n")
    (folder / "compose.yaml").write_text("")
    assert not warned()


def test_memory_against_a_budget(real_bundle: Path, fails: Fails) -> None:
    # GPT-2's geometry, counted by hand: 16 rows of 1024 with 12 layers of 768.
    parts = memory(real_bundle / "savedmodel/1", GPT2, 16)
    assert parts["cache"] == 2 * (2 * 12 * 16 * 1024 * 768 * 4)
    assert parts["activations"] == 2 * (16 * 1024 * 50257 * 4)
    weights = sum(weight.numpy().nbytes for weight in keras_model("bytes").trainable_variables)
    assert stored_bytes(real_bundle / "savedmodel/1") > weights
    fails(["lint", str(real_bundle), "--no-measure", "--gpu-memory", "1MiB"], 1, "over the budget of 1.0 MiB")
    assert run(["lint", str(real_bundle), "--no-measure", "--gpu-memory", "16GiB"]) == 0


def test_sizes() -> None:
    assert [parse_size(text) for text in ("16GiB", "80 GB", "1.5MiB")] == [2**34, 80 * 10**9, 3 * 2**19]


def test_what_is_no_savedmodel(tmp_path: Path, fails: Fails, real_bundle: Path) -> None:
    fails(["lint", str(tmp_path)], 2, "no SavedModel here")
    fails(["lint", str(tmp_path), "--gpu-memory", "lots"], 2, "'lots' is not a size such as 16GiB")
    (tmp_path / "saved_model.pb").write_bytes(b"not a message")
    fails(["lint", str(tmp_path)], 1, "not a SavedModel")
    (tmp_path / "saved_model.pb").write_bytes(b"")
    fails(["lint", str(tmp_path)], 1, "no graph with the tag 'serve'")
    for version in ("9", "10"):
        shutil.copytree(real_bundle / "savedmodel/1", tmp_path / "models" / version)
    assert find_target(tmp_path / "models").version.name == "10"


@pytest.mark.slow
def test_a_build_ends_on_an_error(tmp_path: Path, fresh: Any, fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    from builder.tf_export import lint_graph

    monkeypatch.setattr(lint_graph, "PYTHON", ("MatMul",))
    fails(fresh.build("training.epochs=0", "export.variants=[]"), 1, "MatMul calls Python")
    assert not fresh.bundle.exists()
