"""What the Ray application is told: wrong arguments, bundles and clusters end in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from serving.errors import GPT2BundleError
from serving.ray.options import RayOptions, check_bundle, check_nodes, read_options


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({}, ["bundle"]),
        ({"bundle": 3}, ["bundle"]),
        ({"bundle": "b", "replicas": 3}, ["replicas"]),
        ({"bundle": "b", "cpus": "2"}, ["cpus"]),
        ({"bundle": "b", "cpus": -1}, ["cpus", "0 or more"]),
        ({"bundle": "b", "min_replicas": 3, "max_replicas": 2}, ["min_replicas", "max_replicas"]),
        ({"bundle": "b", "max_replicas": 0, "min_replicas": 0}, ["max_replicas"]),
        ({"bundle": "b", "prefix_characters": 0}, ["prefix_characters"]),
    ],
)
def test_wrong_args_end_in_one_line(args: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(GPT2BundleError) as caught:
        read_options(args)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_serve_options_are_those_of_the_command() -> None:
    options = read_options({"bundle": "b", "serve": ["--max-num-seqs=3", "--max-body", "1MiB"], "cpus": 1})
    assert options.serve_options()["max_num_seqs"] == 3 and options.serve_options()["max_body"] == 1 << 20
    with pytest.raises(GPT2BundleError, match="no-such"):
        read_options({"bundle": "b", "serve": ["--no-such=3"]}).serve_options()


def test_a_bundle_is_checked_before_anything_starts(real_bundle: Path, tmp_path: Path) -> None:
    need = check_bundle(RayOptions(str(real_bundle)))
    assert need > 400 << 20
    assert check_bundle(RayOptions(str(real_bundle), memory=1 << 40)) == 1 << 40
    with pytest.raises(GPT2BundleError, match="needs about"):
        check_bundle(RayOptions(str(real_bundle), memory=1 << 20))
    with pytest.raises(GPT2BundleError, match="no such folder"):
        check_bundle(RayOptions(str(tmp_path / "none")))


@pytest.mark.parametrize("version", [0, 99])
def test_a_bundle_of_another_schema_is_refused(real_bundle: Path, tmp_path: Path, version: int) -> None:
    folder = tmp_path / "skewed"
    shutil.copytree(real_bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (folder / "manifest.json").write_text(json.dumps(manifest | {"schema_version": version}), encoding="utf-8")
    with pytest.raises(GPT2BundleError, match="schema") as caught:
        check_bundle(RayOptions(str(folder)))
    assert "\n" not in str(caught.value)


def test_a_cluster_without_the_resources_is_refused_by_node() -> None:
    need = {"CPU": 2.0, "memory": float(3 << 30)}
    check_nodes(need, [{"CPU": 1.0}, {"CPU": 4.0, "memory": 4e9}])
    check_nodes({}, [{}])
    # Enough together is not enough: a replica lives on one node.
    nodes = [{"CPU": 2.0, "memory": 1e9}, {"CPU": 1.0, "memory": 8e9}]
    with pytest.raises(GPT2BundleError, match="no node of the Ray cluster") as caught:
        check_nodes(need, nodes)
    assert "3072 MiB" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(GPT2BundleError, match="1 GPU"):
        check_nodes({"GPU": 1.0}, [{"CPU": 64.0}])
    with pytest.raises(GPT2BundleError, match="no node"):
        check_nodes(need, [])
