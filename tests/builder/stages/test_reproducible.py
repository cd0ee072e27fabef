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

from builder.onnx_export.trace import _settle
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


def graph(seed: int) -> onnx.GraphProto:
    """A sum of two slices, as a converter leaves it: with equal constants and nodes under names of its own choice."""
    random = np.random.default_rng(seed)
    ones, twos = (list(random.permutation([f"{kind}{number}" for number in range(3)])) for kind in ("one", "two"))
    nodes = [
        helper.make_node("Slice", ["x", ones[0], twos[0], ones[1]], ["left"], name="left"),
        helper.make_node("Slice", ["x", ones[1], twos[1], ones[1]], ["right"], name="right"),
        helper.make_node("Cast", ["left"], ["wide"], name="wide", to=1),
        helper.make_node("Neg", ["right" if seed % 2 else "left"], ["less"], name="less"),
    ]
    nodes = [*nodes[:2][:: 1 if seed % 3 else -1], *nodes[2:][:: 1 if seed % 2 else -1]]
    tensors = [numpy_helper.from_array(np.int64([1]), str(name)) for name in ones]
    tensors += [numpy_helper.from_array(np.int64([2]), str(name)) for name in twos]
    tensors.append(numpy_helper.from_array(np.int64([2]), "unused"))
    outputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("wide", "less")]
    order = random.permutation(len(tensors))
    return helper.make_graph(nodes, "g", [], outputs, [tensors[place] for place in order])


def test_a_traced_graph_is_a_function_of_what_it_computes() -> None:
    graphs = [graph(seed) for seed in range(12)]
    for each in graphs:
        _settle(each)
        assert each == graphs[0]
    assert [(node.op_type, list(node.input)) for node in graphs[0].node] == [
        ("Slice", ["x", "constant_0", "constant_1", "constant_0"]),
        ("Cast", ["traced_0_Slice_0"]),
        ("Neg", ["traced_0_Slice_0"]),
    ]
    assert [value.name for value in graphs[0].output] == ["traced_1_Cast_0", "traced_2_Neg_0"]
    assert [numpy_helper.to_array(tensor).tolist() for tensor in graphs[0].initializer] == [[1], [2]]


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
