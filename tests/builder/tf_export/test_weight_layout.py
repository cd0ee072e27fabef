"""Matrices in parts: the same answers from every signature, the same bytes on the disk, and the flags to match."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

from builder.keras_backend import tf
from builder.tf_export.servable import Servable
from serving.cli import run
from tests.builder.tf_export.savedmodel_calls import columns, padded, session_call
from tests.builder.tf_export.test_servable import expected, random_rows
from tests.oracles.fixtures import keras_model


@pytest.mark.slow
def test_answers_and_bytes_are_those_of_whole_matrices(tmp_path: Path, real_bundle: Path) -> None:
    # No size of the model is a multiple of it.
    model, parts = keras_model("bytes"), 5
    Servable(model, slots=3, matmul_parts=parts).save(tmp_path)
    split, whole = session_call(str(tmp_path)), session_call(str(real_bundle / "savedmodel/1"))
    prompts, rows = random_rows(np.random.default_rng(parts), 8)
    inputs = padded(prompts) | columns(rows)
    answer = split("serving_default", **inputs)
    made = [row[:length].tolist() for row, length in zip(answer["token_ids"], answer["lengths"], strict=True)]
    assert made == expected(prompts, rows)
    ours, theirs = split("score", **padded(prompts)), whole("score", **padded(prompts))
    assert np.abs(ours["log_probs"] - theirs["log_probs"]).max() < 1e-5
    first = split("prefill_slots", request_id=np.arange(1, 4), **{name: value[:3] for name, value in inputs.items()})
    assert first["token_ids"].ravel().tolist() == [row[0] for row in made[:3]]
    # Such an op makes each later read of its variable a copy: on weights it took 9 ms a token at 124M.
    library = SavedModel.FromString((tmp_path / "saved_model.pb").read_bytes()).meta_graphs[0].graph_def.library
    gathered = [node for function in library.function for node in function.node_def if node.op == "ResourceGather"]
    assert {node.attr["dtype"].type for node in gathered} <= {tf.int64.as_datatype_enum}
    stored = sum(path.stat().st_size for path in (tmp_path / "variables").iterdir())
    assert 4 * model.geometry.parameters <= stored < 4 * model.geometry.parameters + 60_000


def test_deploy_gives_each_part_a_thread(tmp_path: Path, real_bundle: Path) -> None:
    assert run(["deploy", str(real_bundle), "--target", "tfserving", "--output", str(tmp_path / "whole")]) == 0
    assert "op_parallelism" not in (tmp_path / "whole/run.sh").read_text()
    folder = tmp_path / "bundle"
    shutil.copytree(real_bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["provenance"]["recipe"] = {"export": {"matmul_parts": 2}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert run(["deploy", str(folder), "--target", "tfserving", "--output", str(tmp_path / "parts")]) == 0
    for file in ("run.sh", "compose.yaml"):
        text = (tmp_path / "parts" / file).read_text()
        assert "--tensorflow_intra_op_parallelism=1" in text and "--tensorflow_inter_op_parallelism=2" in text
