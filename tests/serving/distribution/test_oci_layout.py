"""`gpt2-bundle publish oci:`: the layout against the specification's rules, and read by other implementations."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.bundle import open_bundle
from serving.cli import run
from tests.closed_form import write_bundle
from tests.serving.distribution.keys import key_pair
from tests.tiny_build import Fails, contents

CARD = b"# tiny\n" * 100
TITLE = "org.opencontainers.image.title"
REGISTRY = "docker-registry"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    write_bundle(folder, extra={"README.md": CARD, "onnx/twin.bin": CARD, "onnx/\u4f60.txt": b"x"})
    return folder


def blob(layout: Path, descriptor: dict[str, Any]) -> bytes:
    """The bytes of a descriptor, held against its digest and size: section "Descriptors" of the specification."""
    algorithm, _, digest = descriptor["digest"].partition(":")
    data = (layout / "blobs" / algorithm / digest).read_bytes()
    assert hashlib.new(algorithm, data).hexdigest() == digest and len(data) == descriptor["size"]
    return data


def read_layout(layout: Path, tag: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest of `tag` and its files by title, read by the specification, without this project's code."""
    assert json.loads((layout / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((layout / "index.json").read_bytes())
    assert index["schemaVersion"] == 2 and index["mediaType"] == "application/vnd.oci.image.index.v1+json"
    key = "org.opencontainers.image.ref.name"
    (entry,) = (each for each in index["manifests"] if each.get("annotations", {}).get(key) == tag)
    assert entry["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    manifest = json.loads(blob(layout, entry))
    assert manifest["schemaVersion"] == 2 and manifest["mediaType"] == entry["mediaType"]
    # An artifact without a configuration: "Guidelines for Artifact Usage" of the specification.
    assert manifest["artifactType"] == entry["artifactType"] == "application/vnd.gpt2-bundle.bundle.v1"
    assert manifest["config"]["mediaType"] == "application/vnd.oci.empty.v1+json"
    assert blob(layout, manifest["config"]) == b"{}"
    return manifest, {layer["annotations"][TITLE]: blob(layout, layer) for layer in manifest["layers"]}


def publish(bundle: Path, layout: Path, tag: str = "v1", *options: str) -> int:
    return run(["publish", str(bundle), f"oci:{layout}:{tag}", *options])


def test_a_layout_holds_the_bundle(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, layout = contents(bundle), tmp_path / "layout"
    assert publish(bundle, layout, "v1", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    manifest, files = read_layout(layout, "v1")
    assert files == before == contents(bundle)
    assert manifest["annotations"]["org.opencontainers.image.created"] == open_bundle(bundle).manifest.created
    # Files of equal content are one blob; nothing else lies around.
    kept = {layer["digest"] for layer in manifest["layers"]} | {manifest["config"]["digest"], said["digest"]}
    assert {f"sha256:{path.name}" for path in (layout / "blobs/sha256").iterdir()} == kept
    assert len(manifest["layers"]) > len({layer["digest"] for layer in manifest["layers"]})
    assert sorted(path.name for path in layout.iterdir()) == ["blobs", "index.json", "oci-layout"]


def test_digests_depend_on_the_bundle_alone(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "copy" / "other-name")
    for folder, layout in ((bundle, "one"), (tmp_path / "copy" / "other-name", "two")):
        assert publish(folder, tmp_path / layout) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_second_tag_keeps_the_first_and_the_same_tag_moves(bundle: Path, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    assert publish(bundle, layout, "v1") == 0
    write_bundle(tmp_path / "next", name="next", extra={"README.md": CARD})
    assert publish(tmp_path / "next", layout, "v2") == 0
    assert read_layout(layout, "v1")[1] == contents(bundle)
    assert read_layout(layout, "v2")[1] == contents(tmp_path / "next")
    assert publish(tmp_path / "next", layout, "v1") == 0
    assert read_layout(layout, "v1")[1] == contents(tmp_path / "next")


def test_the_default_tag_is_latest(bundle: Path, tmp_path: Path) -> None:
    assert run(["publish", str(bundle), f"oci:{tmp_path / 'a.b' / 'layout'}"]) == 0
    assert read_layout(tmp_path / "a.b" / "layout", "latest")[1] == contents(bundle)


def test_a_damaged_blob_is_written_again_and_whole_ones_are_kept(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = tmp_path / "layout"
    assert publish(bundle, layout) == 0
    digest = hashlib.sha256(CARD).hexdigest()
    path = layout / "blobs/sha256" / digest
    path.write_bytes(CARD[:-1] + b"?")
    (layout / "blobs/sha256/.unfinished-old").write_bytes(b"half")
    capsys.readouterr()
    assert publish(bundle, layout, "v1", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["size"] - said["reused"] == len(CARD)
    assert read_layout(layout, "v1")[1] == contents(bundle)
    assert not list(layout.rglob(".unfinished*"))


def test_an_interrupted_publish_is_resumed_and_the_old_tag_stays(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Fails, capfd: pytest.CaptureFixture[str]
) -> None:
    layout = tmp_path / "layout"
    assert publish(bundle, layout) == 0
    write_bundle(tmp_path / "next", name="next", extra={"README.md": b"new", "a.txt": b"a", "b.txt": b"b"})
    from serving.distribution import oci_layout

    calls, fsync = [0], os.fsync

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] > 2:
            raise OSError(28, "No space left on device", "blobs")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(oci_layout.os, "fsync", full)
        fails(["publish", str(tmp_path / "next"), f"oci:{layout}:v1"], 1, "No space left on device")
    assert read_layout(layout, "v1")[1] == contents(bundle)
    assert not list(layout.rglob(".unfinished*"))
    capfd.readouterr()
    assert publish(tmp_path / "next", layout, "v1", "--json") == 0
    assert json.loads(capfd.readouterr().out)["reused"] > 0
    assert read_layout(layout, "v1")[1] == contents(tmp_path / "next")


def test_a_first_publish_that_was_interrupted_is_resumed(bundle: Path, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    assert publish(bundle, layout) == 0
    (layout / "index.json").unlink()
    (layout / "oci-layout").unlink()
    assert publish(bundle, layout) == 0
    assert read_layout(layout, "v1")[1] == contents(bundle)


def test_other_folders_are_left_alone(bundle: Path, tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "oci-layout").write_text('{"imageLayoutVersion": "2.0.0"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (tmp_path / "broken" / "index.json").write_text('{"manifests": 7}')
    before = contents(tmp_path)
    for name, words in (
        ("full", "is not an OCI image layout"),
        ("file", "is not a folder"),
        ("newer", "cannot be read"),
        ("broken", "cannot be read"),
        ("tiny/layout", "lies inside the bundle"),
    ):
        fails(["publish", str(bundle), f"oci:{tmp_path / name}:v1"], 2, words)
    assert contents(tmp_path) == before


def test_two_processes_do_not_write_at_once(bundle: Path, tmp_path: Path, fails: Fails) -> None:
    layout = tmp_path / "layout"
    layout.mkdir()
    descriptor = os.open(layout, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        fails(["publish", str(bundle), f"oci:{layout}:v1"], 2, "another process writes to this layout")
    finally:
        os.close(descriptor)
    assert publish(bundle, layout) == 0


def test_a_file_that_changes_meanwhile_is_found(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from serving.distribution.oci_layout import write_layout
    from serving.errors import BundleError

    opened = open_bundle(bundle)
    (bundle / "README.md").write_bytes(CARD[:-1] + b"?")
    with pytest.raises(BundleError, match=r"README\.md.*has changed"):
        write_layout(opened, tmp_path / "layout", "v1")
    assert not (tmp_path / "layout" / "index.json").exists()


def test_a_signature_and_a_bill_of_materials_refer_to_the_bundle(bundle: Path, tmp_path: Path, fails: Fails) -> None:
    private, _ = key_pair(tmp_path)
    assert run(["sign", str(bundle), "--key", str(private)]) == 0
    assert run(["sbom", str(bundle), "--output", str(tmp_path / "tiny.cdx.json")]) == 0
    attached = [str(tmp_path / "tiny.sig"), str(tmp_path / "tiny.cdx.json")]
    options = [word for path in attached for word in ("--attach", path)]
    layout = tmp_path / "layout"
    assert publish(bundle, layout, "v1", *options) == 0
    assert publish(bundle, layout, "v1", *options) == 0
    index = json.loads((layout / "index.json").read_bytes())
    (entry, *referrers) = sorted(index["manifests"], key=lambda each: "annotations" not in each)
    assert len(referrers) == 2
    found = {}
    for each in referrers:
        manifest = json.loads(blob(layout, each))
        assert {key: entry[key] for key in ("mediaType", "digest", "size")} == manifest["subject"]
        (layer,) = manifest["layers"]
        assert manifest["artifactType"] == each["artifactType"] == layer["mediaType"]
        found[layer["mediaType"], layer["annotations"][TITLE]] = blob(layout, layer)
    assert found == {
        ("application/vnd.dev.sigstore.bundle.v0.3+json", "tiny.sig"): Path(attached[0]).read_bytes(),
        ("application/vnd.cyclonedx+json", "tiny.cdx.json"): Path(attached[1]).read_bytes(),
    }
    write_bundle(tmp_path / "next", name="next")
    for path in attached:
        fails(["publish", str(tmp_path / "next"), f"oci:{layout}:v1", "--attach", path], 2, "of another bundle")
    fails(["publish", str(bundle), f"oci:{layout}:v1", "--attach", str(bundle / "README.md")], 2, "one of the bundle")
    (tmp_path / "notes.json").write_text("{}")
    fails(["publish", str(bundle), f"oci:{layout}:v1", "--attach", str(tmp_path / "notes.json")], 2, "is neither")


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """A registry on a loopback port: Debian's docker-registry, the CNCF's own implementation."""
    if shutil.which(REGISTRY) is None:
        pytest.skip(f"{REGISTRY} is not installed")
    port = 5000 + os.getpid() % 20000
    settings = tmp_path / "registry.yml"
    settings.write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {tmp_path / 'registry'}}}}}\n"
        f"http: {{addr: 127.0.0.1:{port}}}\nlog: {{level: error}}\n"
    )
    with subprocess.Popen(
        [REGISTRY, "serve", settings], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as server:
        try:
            for _ in range(100):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.1)
            yield f"127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(10)


@pytest.mark.ecosystem
def test_oras_pushes_the_layout_and_pulls_the_bundle(bundle: Path, tmp_path: Path, registry: str) -> None:
    """oras (Python) reads the layout and pushes it to a registry, from where it pulls the files by their titles."""
    python = os.environ.get("ORAS_PYTHON")
    if python is None:
        pytest.skip("ORAS_PYTHON names no environment with oras; 'make test-ecosystem' makes it")
    layout, target = tmp_path / "layout", tmp_path / "pulled"
    assert publish(bundle, layout) == 0
    script = Path(__file__).with_name("oras_round_trip.py")
    done = subprocess.run([python, script, layout, registry, target], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert contents(open_bundle(target).folder) == contents(bundle)


@pytest.mark.ecosystem
def test_skopeo_copies_the_layout(bundle: Path, tmp_path: Path, registry: str) -> None:
    if shutil.which("skopeo") is None:
        pytest.skip("skopeo is not installed")
    layout = tmp_path / "layout"
    assert publish(bundle, layout) == 0
    inspected = subprocess.run(["skopeo", "inspect", "--raw", f"oci:{layout}:v1"], capture_output=True, timeout=60)
    assert inspected.returncode == 0, inspected.stderr
    assert json.loads(inspected.stdout) == read_layout(layout, "v1")[0]
