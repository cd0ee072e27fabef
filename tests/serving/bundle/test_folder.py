"""The contract: what is written is what opens, and nothing else does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.bundle import Provenance, from_json, open_bundle, to_json, write_manifest
from serving.errors import BundleError, InputError
from tests.closed_form import geometry, graphs

RELAXED = settings(
    deadline=None, derandomize=True, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_round_trip_is_exact(bundle_folder: Path) -> None:
    data = (bundle_folder / "manifest.json").read_text(encoding="utf-8")
    manifest = from_json(data)
    assert to_json(manifest) == data
    assert from_json(to_json(manifest)) == manifest == open_bundle(bundle_folder).manifest
    assert manifest.provenance.recipe["training"]["paths"] == ["a", "b"]
    assert [artifact.path for artifact in manifest.artifacts] == sorted(each.path for each in manifest.artifacts)


def test_paths_and_graphs(bundle_folder: Path) -> None:
    bundle = open_bundle(str(bundle_folder))
    assert bundle.path("ort/fp32/model.onnx").read_bytes() == b"tinytinytiny"
    assert bundle.graph_size("ort/fp32") == 12 + 256
    assert bundle.graph_size("savedmodel/serving_default") == 2
    for name in ("manifest.json", "../tiny/README.md", "ort", "/etc/passwd", ""):
        with pytest.raises(BundleError, match="has no file"):
            bundle.path(name)
    with pytest.raises(InputError, match="did you mean 'ort/fp32'"):
        bundle.graph("ort/fp16")


@RELAXED
@given(st.data())
def test_any_changed_byte_is_found_and_named(bundle_folder: Path, data: st.DataObject) -> None:
    sizes = {each.path: each.size for each in open_bundle(bundle_folder, "sizes").manifest.artifacts if each.size}
    name = data.draw(st.sampled_from(sorted(sizes)))
    whole = (bundle_folder / name).read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    broken = bytearray(whole)
    broken[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        (bundle_folder / name).write_bytes(broken)
        with pytest.raises(BundleError, match=f"'{name}' has changed"):
            open_bundle(bundle_folder)
        open_bundle(bundle_folder, check="sizes")
        (bundle_folder / name).write_bytes(whole[:place])
        with pytest.raises(BundleError, match=f"'{name}' has {place} bytes instead of {len(whole)}"):
            open_bundle(bundle_folder, check="sizes")
        (bundle_folder / name).unlink()
        with pytest.raises(BundleError, match=f"'{name}' is missing"):
            open_bundle(bundle_folder)
    finally:
        (bundle_folder / name).write_bytes(whole)


@pytest.mark.parametrize("name", ["extra.txt", ".hidden", "ort/.DS_Store", "new/folder/file", "bad\udcff"])
def test_files_that_the_manifest_does_not_name(bundle_folder: Path, name: str) -> None:
    (bundle_folder / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle_folder / name).write_bytes(b"x")
    with pytest.raises(BundleError, match="is not in the manifest") as caught:
        open_bundle(bundle_folder)
    assert repr(name) in str(caught.value)


def test_links_and_special_files(bundle_folder: Path, tmp_path: Path) -> None:
    readme = bundle_folder / "README.md"
    outside = tmp_path / "outside"
    readme.rename(outside)
    readme.symlink_to(outside)
    with pytest.raises(BundleError, match=r"'README\.md' is a symbolic link"):
        open_bundle(bundle_folder)
    readme.unlink()
    os.mkfifo(readme)
    with pytest.raises(BundleError, match=r"'README\.md' is not a plain file"):
        open_bundle(bundle_folder)
    readme.unlink()
    outside.rename(readme)
    (bundle_folder / "up").symlink_to("..")
    with pytest.raises(BundleError, match="'up' is a symbolic link"):
        open_bundle(bundle_folder)
    (bundle_folder / "up").unlink()
    (tmp_path / "link").symlink_to(bundle_folder)
    assert open_bundle(tmp_path / "link").manifest.name == "tiny"


def test_folders_that_are_no_bundles(bundle_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        open_bundle(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is not a folder"):
        open_bundle(bundle_folder / "README.md")
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        open_bundle(tmp_path)
    (bundle_folder / "manifest.json").unlink()
    (bundle_folder / "manifest.json").mkdir()
    with pytest.raises(BundleError, match="not a plain file"):
        open_bundle(bundle_folder)


def test_write_manifest_refuses_what_open_would(bundle_folder: Path) -> None:
    def write(**changes: Any) -> None:
        arguments: dict[str, Any] = {
            "name": "tiny",
            "model": geometry(),
            "graphs": graphs(),
            "provenance": Provenance({}, "ab" * 32, {}, 1),
            "quality": {},
            "parity": {},
        }
        write_manifest(bundle_folder, **{**arguments, **changes})

    before = (bundle_folder / "manifest.json").read_bytes()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"quality": {"loss": float("nan")}}, "cannot be written as JSON"),
        ({"parity": {"where": Path("x")}}, "cannot be written as JSON"),
        ({"name": "a/b"}, "name is"),
        ({"provenance": Provenance({}, "short", {}, 1)}, r"provenance\.corpus_sha256"),
    ]
    for changes, message in cases:
        with pytest.raises(BundleError, match=message):
            write(**changes)
        assert (bundle_folder / "manifest.json").read_bytes() == before
    (bundle_folder / "a:b").write_bytes(b"")
    with pytest.raises(BundleError, match="'a:b' must be a relative path"):
        write()
    (bundle_folder / "a:b").unlink()
    write()
    assert open_bundle(bundle_folder).manifest.created.endswith("Z")
    (bundle_folder / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json is missing"):
        write()
