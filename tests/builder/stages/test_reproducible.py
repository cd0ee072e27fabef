"""Two clean builds of one recipe on one machine: the same bytes in every file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from builder.onnx_export.trace import _number_constants, _number_nodes
from builder.tf_export.fingerprint import settle_fingerprint
from serving.bundle import open_bundle, write_manifest
from serving.errors import InputError
from tests.tiny_build import TinyBuild, contents, write_corpus


@pytest.mark.slow
def test_two_builds_with_other_hash_seeds_have_the_same_bytes(tmp_path: Path) -> None:
    tiny = TinyBuild(write_corpus(tmp_path / "corpus.txt"), tmp_path / "runs", tmp_path / "dist")
    code = "import sys; from serving.cli import run; sys.exit(run(sys.argv[1:]))"
    found = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "SOURCE_DATE_EPOCH": "1700000000"}
        settings = tiny.build('export.variants=["fp16", "int8", "int4"]', "verify.fp16_perplexity=1")
        subprocess.run([sys.executable, "-c", code, *settings], check=True, env=environment, capture_output=True)
        found.append(contents(tiny.bundle))
        for folder in (tiny.runs, tiny.dist):
            shutil.rmtree(folder)
    assert found[0].keys() == found[1].keys()
    assert [name for name in found[0] if found[0][name] != found[1][name]] == []
    assert b'"created": "2023-11-14T22:13:20Z"' in found[0]["manifest.json"]


def graph(order: list[int]) -> onnx.GraphProto:
    """A sum whose two terms, and whose two factors, are equal constants, of which either may be named."""
    arrays = [
        ("a", np.int64([1])),
        ("b", np.int64([1])),
        ("c", np.float32(2)),
        ("d", np.float32(2)),
        ("e", np.int32([1])),
    ]
    used = ["ab"[order[0]], "cd"[order[1]]]
    nodes = [
        helper.make_node("Slice", ["x", used[0], "e", "a"], ["y"], name="slice"),
        helper.make_node("Mul", ["y", used[1]], ["z"], name="mul"),
    ]
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays]
    return helper.make_graph(nodes, "g", [], [], [tensors[place] for place in order])


def test_equal_constants_are_one_whatever_the_order_they_come_in() -> None:
    graphs = [graph([0, 1, 2, 3, 4]), graph([1, 0, 4, 2, 3])]
    for each in graphs:
        _number_constants(each)
    assert graphs[0] == graphs[1]
    assert [list(node.input) for node in graphs[0].node] == [
        ["x", "constant_0", "constant_1", "constant_0"], ["y", "constant_2"],
    ]  # fmt: skip
    assert [numpy_helper.to_array(tensor).dtype.name for tensor in graphs[0].initializer] == [
        "int64",
        "int32",
        "float32",
    ]


def test_nodes_are_named_by_their_place() -> None:
    graphs = []
    for kept in ("a/Shape_1", "a/Shape_2"):
        nodes = [
            helper.make_node("Shape", ["x"], [f"{kept}:0"], name=kept),
            helper.make_node("Cast", [f"{kept}:0"], ["y"], to=6),
        ]
        outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.INT32, [1])]
        graphs.append(helper.make_graph(nodes, "g", [], outputs))
        _number_nodes(graphs[-1])
    assert graphs[0] == graphs[1]
    assert [(node.name, *node.input, *node.output) for node in graphs[0].node] == [
        ("traced_0_Shape", "x", "traced_0_Shape_0"), ("traced_1_Cast", "traced_0_Shape_0", "traced_1_Cast_0"),
    ]  # fmt: skip
    assert graphs[0].output[0].name == "traced_1_Cast_0"


def test_a_savedmodels_fingerprint_is_of_the_savedmodel_alone(built: TinyBuild, tmp_path: Path) -> None:
    from tensorflow.core.protobuf.fingerprint_pb2 import FingerprintDef

    path = tmp_path / "fingerprint.pb"
    written = (built.bundle / "savedmodel" / "1" / "fingerprint.pb").read_bytes()
    found = []
    for changes in ({"uuid": "1"}, {"uuid": "2"}, {"graph_def_program_hash": 5}):
        fingerprint = FingerprintDef.FromString(written)
        for key, value in changes.items():
            setattr(fingerprint, key, value)
        path.write_bytes(fingerprint.SerializeToString())
        settle_fingerprint(tmp_path)
        found.append(path.read_bytes())
    assert found[0] == found[1] == written != found[2]
    assert FingerprintDef.FromString(found[0]).uuid != FingerprintDef.FromString(found[2]).uuid


def test_the_time_in_a_manifest_may_be_given(built: TinyBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(built.bundle, tmp_path / "b"))
    manifest = open_bundle(folder).manifest
    fields = {key: getattr(manifest, key) for key in ("name", "model", "graphs", "provenance", "quality", "parity")}
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert write_manifest(folder, **fields).created == "1970-01-01T00:00:00Z"
    for wrong in ("", "soon", "9" * 30):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", wrong)
        with pytest.raises(InputError, match="seconds since 1970"):
            write_manifest(folder, **fields)
