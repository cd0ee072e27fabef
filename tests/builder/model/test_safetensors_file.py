"""One file of bytes for everybody: where each tensor lies, and who may share the file."""

from __future__ import annotations

import itertools
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from builder.model.gpt2 import named_variables
from builder.model.safetensors_file import WeightFile, clone_or_copy, write_safetensors
from builder.onnx_export.external_data import EXTERNAL_DATA, write_graph
from tests.oracles.fixtures import FOLDER, NAMES, keras_model
from tests.oracles.tiny_bundle import trace_portable


def test_what_is_written_is_what_the_model_has(tmp_path: Path) -> None:
    model = keras_model("odd_heads")
    write_safetensors(model, tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")
    named = dict(named_variables(model))
    assert set(stored) == set(named)
    for name, value in stored.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, named[name].numpy(), err_msg=name)
    # Byte for byte as the library writes it, which takes all tensors at once.
    save_file({name: variable.numpy() for name, variable in named.items()}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()
    one_by_one = WeightFile(tmp_path / "model.safetensors")
    for name, variable in named.items():
        np.testing.assert_array_equal(one_by_one.get_tensor(name), variable.numpy(), err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_ranges_are_the_tensors_bytes(name: str) -> None:
    path = FOLDER / name / "model.safetensors"
    data, stored = path.read_bytes(), load_file(path)
    file = WeightFile(path)
    ranges = {key: file.byte_range(key) for key in stored}
    for key, (offset, length) in ranges.items():
        assert data[offset : offset + length] == stored[key].tobytes(), key
    spans = sorted((offset, offset + length) for offset, length in ranges.values())
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert spans[-1][1] == len(data)


def test_ranges_leave_metadata_out_and_count_the_header(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": np.arange(6, dtype=np.float32)}, path, metadata={"note": "é" * 50})
    (header,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert "__metadata__" in json.loads(path.read_bytes()[8 : 8 + header])
    assert WeightFile(path).byte_range("x") == (8 + header, 24)


def written(folder: Path, traced: Any) -> Path:
    write_safetensors(keras_model("one_block"), folder / "model.safetensors")
    write_graph(traced, folder / "model.safetensors", folder / "onnx/model.onnx")
    return folder / "onnx/model.onnx"


def test_a_graph_is_written_again_over_an_older_one(tmp_path: Path) -> None:
    traced = trace_portable(keras_model("one_block"))
    before = traced.model.SerializeToString()
    first = written(tmp_path, traced).read_bytes()
    assert written(tmp_path, traced).read_bytes() == first
    assert traced.model.SerializeToString() == before, "the trace must stay as it is, for the next variant"
    onnx.load(tmp_path / "onnx/model.onnx")


def test_a_copy_has_one_name_and_the_same_bytes(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(3_000_000))
    clone_or_copy(source, target)
    assert target.read_bytes() == source.read_bytes()
    # onnx refuses external data with a second hard link.
    assert source.stat().st_nlink == target.stat().st_nlink == 1


def test_a_copy_never_writes_through_a_link(tmp_path: Path) -> None:
    source, target, other = tmp_path / "source", tmp_path / "target", tmp_path / "another bundle's"
    source.write_bytes(b"new")
    other.write_bytes(b"old")
    os.link(other, target)
    clone_or_copy(source, target)
    assert target.read_bytes() == b"new" and other.read_bytes() == b"old"
    target.unlink()
    target.symlink_to(other)
    clone_or_copy(source, target)
    assert not target.is_symlink() and other.read_bytes() == b"old"


def test_a_weight_that_the_file_lacks_is_not_passed_over(tmp_path: Path) -> None:
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(KeyError, match=r"transformer\.wte\.weight"):
        write_graph(trace_portable(keras_model("one_block")), tmp_path / "other.safetensors", tmp_path / "g/model.onnx")
    assert not (tmp_path / "g").exists()
    assert EXTERNAL_DATA == "model.onnx_data"
