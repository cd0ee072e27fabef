"""A bundle whose SavedModel writes a file: every way to load it refuses it first, and the file is not there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builder.keras_backend import tf
from builder.tf_export.session_servable import SessionServable
from serving.backends.loader import load_backend
from serving.bundle import open_bundle, write_manifest
from serving.cli import run
from serving.clients.session_transport import load_slot_transport
from serving.errors import BundleError
from tests.tiny_build import Fails

PARAMETERS = {
    "max_new_tokens": tf.int32,
    "temperature": tf.float32,
    "top_k": tf.int32,
    "top_p": tf.float32,
    "seed": tf.int64,
}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return tmp_path / "written"


@pytest.fixture
def bundle(real_bundle: Path, tmp_path: Path, written: Path) -> Path:
    """The tiny bundle with the signatures that are called first, in a graph that writes a file in a nested function."""
    folder = Path(shutil.copytree(real_bundle, tmp_path / "bytes"))
    shutil.rmtree(folder / "savedmodel/1")

    def write() -> Any:
        with tf.control_dependencies([tf.raw_ops.WriteFile(filename=str(written), contents="x")]):
            return tf.constant(0)

    def generate(token_ids: Any, lengths: Any, **parameters: Any) -> Any:
        with tf.control_dependencies([tf.cond(tf.size(lengths) > 0, write, lambda: tf.constant(0))]):
            return {"token_ids": tf.zeros_like(token_ids), "lengths": tf.identity(lengths)}

    def prefill(token_ids: Any, lengths: Any, capacity: Any) -> Any:
        return generate(token_ids, lengths) | {"logits": tf.zeros([tf.size(capacity), 256])}

    module = tf.Module()
    tokens = [tf.TensorSpec([None, None], tf.int32, name="token_ids"), tf.TensorSpec([None], tf.int32, name="lengths")]
    more = {name: tf.TensorSpec([None], kind, name=name) for name, kind in PARAMETERS.items()}
    signatures = {
        "serving_default": tf.function(generate, autograph=False).get_concrete_function(*tokens, **more),
        "prefill": tf.function(prefill, autograph=False).get_concrete_function(
            *tokens, tf.TensorSpec([None], tf.int32, name="capacity")
        ),
        "decode": tf.function(generate, autograph=False).get_concrete_function(*tokens),
    }
    tf.saved_model.save(module, str(folder / "savedmodel/1"), signatures=signatures)
    old = open_bundle(real_bundle, check="sizes").manifest
    write_manifest(
        folder, name="bytes", model=old.model, graphs=old.graphs, provenance=old.provenance, quality={}, parity={}
    )
    return folder


@pytest.mark.parametrize(
    "load",
    [
        lambda bundle: load_backend(open_bundle(bundle), "tensorflow"),
        lambda bundle: load_slot_transport(open_bundle(bundle)),
        lambda bundle: SessionServable(bundle / "savedmodel/1"),
    ],
)
def test_no_loader_takes_it(bundle: Path, load: Callable[[Path], Any]) -> None:
    with pytest.raises(BundleError, match=r"the op 'WriteFile' \(node .*it was not loaded"):
        load(bundle)


def test_no_command_runs_it(bundle: Path, tmp_path: Path, written: Path, fails: Fails) -> None:
    words = ("WriteFile", "not loaded")
    fails(["generate", str(bundle), "a", "--runtime", "tensorflow"], 1, *words)
    fails(["serve", str(bundle), "--runtime", "tensorflow", "--port", "0"], 1, *words)
    fails(["deploy", str(bundle), "--target", "tfserving", "--output", str(tmp_path / "there")], 1, *words)
    fails(["lint", str(bundle)], 1, "WriteFile")
    # Anyone's SavedModel too.
    fails(["lint", str(bundle / "savedmodel/1")], 1, "WriteFile", "files")
    assert not written.exists() and not (tmp_path / "there").exists()


def test_lint_does_not_run_what_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = tf.Module()
    module.function = tf.function(
        lambda value: {"out": tf.math.erfinv(value)}, input_signature=[tf.TensorSpec([None], tf.float32, name="value")]
    )
    tf.saved_model.save(module, str(tmp_path / "1"), signatures=module.function)
    assert run(["lint", str(tmp_path)]) == 0
    assert "not run here: it holds 'Erfinv'" in capsys.readouterr().out
