"""`gpt2-bundle publish hub:` by huggingface_hub's own client, against a local endpoint with the hub's API."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.bundle import open_bundle
from serving.cli import run
from tests.closed_form import write_bundle
from tests.serving.distribution.fake_hub import LARGE, FakeHub, running_hub
from tests.tiny_build import Fails, contents

CARD = b"---\npipeline_tag: text-generation\n---\n# tiny\n" + b"A model. " * 40
REPOSITORY = "org/tiny"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(_http.time, "sleep", lambda _: None)  # Its waits between tries.
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        yield hub


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    write_bundle(folder, extra={"README.md": CARD, "onnx/twin.bin": CARD})
    return folder


def publish(bundle: Path, *options: str) -> list[str]:
    return ["publish", str(bundle), f"hub:{REPOSITORY}", *options]


def test_a_repository_holds_the_bundle_and_nothing_else(
    hub: FakeHub, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(bundle)
    assert run(publish(bundle, "--json")) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["changed"] and said["commit"] == hub.head(REPOSITORY) and said["url"] == f"{hub.url}/{REPOSITORY}"
    there = dict(hub.files(REPOSITORY))
    assert there.pop(".gitattributes") and there == before == contents(bundle)
    # Large files went by LFS, once for each content; the repository got one commit.
    assert sorted(hub.uploads) == sorted(
        {hashlib.sha256(data).hexdigest() for data in before.values() if len(data) >= LARGE}
    )
    assert len(hub.repositories[REPOSITORY]) == 2 and REPOSITORY not in hub.private
    assert not any("xet" in request for request in hub.requests)


def test_the_same_bundle_is_not_committed_twice(hub: FakeHub, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(publish(bundle)) == 0
    uploads, head = len(hub.uploads), hub.head(REPOSITORY)
    capsys.readouterr()
    assert run(publish(bundle)) == 0
    out, err = capsys.readouterr()
    assert "holds this bundle already" in out and not err
    assert hub.head(REPOSITORY) == head and len(hub.uploads) == uploads


def test_the_next_bundle_replaces_files_and_removes_old_ones(hub: FakeHub, bundle: Path, tmp_path: Path) -> None:
    assert run(publish(bundle, "--private")) == 0
    assert REPOSITORY in hub.private
    write_bundle(tmp_path / "next", extra={"README.md": CARD + b"New."})
    assert run(publish(tmp_path / "next")) == 0
    there = dict(hub.files(REPOSITORY))
    assert there.pop(".gitattributes") and there == contents(tmp_path / "next")
    assert len(hub.repositories[REPOSITORY]) == 3


def test_what_is_no_bundle_on_the_hub_is_left_alone(hub: FakeHub, bundle: Path, fails: Fails) -> None:
    hub.repositories[REPOSITORY] = [{".gitattributes": b"", "README.md": b"", "pytorch_model.bin": b"mine"}]
    fails(publish(bundle), 1, "'pytorch_model.bin' and no bundle", "choose another repository")
    assert len(hub.repositories[REPOSITORY]) == 1 and not hub.uploads


def test_a_changed_bundle_is_not_sent(hub: FakeHub, bundle: Path, fails: Fails) -> None:
    data = bytearray((bundle / "README.md").read_bytes())
    data[-1] ^= 1
    (bundle / "README.md").write_bytes(data)
    fails(publish(bundle), 1, "'README.md' has changed")
    assert not hub.requests


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("hf_reader", ("hub:org/tiny", "rights to create a model", "use a token that may write to org/tiny")),
        ("hf_wrong", ("does not know who asks", "'hf auth login'", "HF_TOKEN")),
        ("", ("does not know who asks", "HF_TOKEN")),
    ],
)
def test_a_token_without_rights_changes_nothing(
    hub: FakeHub, bundle: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch, token: str, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    before = contents(bundle)
    line = fails(publish(bundle), 1, *words)
    assert not token or token not in line
    assert not hub.repositories and not hub.uploads and contents(bundle) == before


def test_a_token_that_may_read_an_existing_repository_only(
    hub: FakeHub, bundle: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(publish(bundle)) == 0
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    fails(publish(bundle), 1, "no write access", "use a token that may write")


def test_a_network_that_goes_away_is_resumed(hub: FakeHub, bundle: Path, fails: Fails) -> None:
    before = contents(bundle)
    last = max(hashlib.sha256(data).hexdigest() for data in before.values() if len(data) >= LARGE)
    hub.fail[f"PUT /lfs/{last}"] = "drop"
    fails(publish(bundle), 1, f"the hub at {hub.url} cannot be reached", "run the same command again")
    arrived = set(hub.uploads)
    assert arrived and last not in arrived
    assert hub.files(REPOSITORY).keys() == {".gitattributes"} and contents(bundle) == before
    hub.fail.clear()
    hub.uploads.clear()
    assert run(publish(bundle)) == 0
    assert hub.uploads == [last], "what had arrived was sent again"
    assert hub.files(REPOSITORY).keys() - {".gitattributes"} == before.keys()


def test_a_hub_that_is_not_there(hub: FakeHub, bundle: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        fails(publish(bundle), 1, "cannot be reached")


@pytest.mark.parametrize(
    ("pattern", "status", "words"),
    [
        ("POST .*/commit/", 500, ("the hub failed", "run the same command again")),
        ("POST .*/commit/", 412, ("the repository changed during the upload", "run the same command again")),
        ("POST .*/objects/batch", 503, ("the hub failed",)),
        ("PUT /lfs/", 413, ("the hub refuses",)),
        ("POST /api/repos/create", 404, ("no such organization or repository", "check the name")),
    ],
)
def test_each_refusal_is_one_line(
    hub: FakeHub, bundle: Path, fails: Fails, pattern: str, status: int, words: tuple[str, ...]
) -> None:
    hub.fail[pattern] = status
    fails(publish(bundle), 1, "hub:org/tiny", *words)
    assert all(len(commits) == 1 for commits in hub.repositories.values())


@pytest.mark.parametrize("path", ["tokenizer.json", "manifest.json", "savedmodel/1/saved_model.pb"])
def test_a_hub_that_keeps_other_bytes_is_found(hub: FakeHub, bundle: Path, fails: Fails, path: str) -> None:
    hub.corrupt = path
    fails(publish(bundle), 1, f"does not hold '{path}' as it is in the bundle")


@pytest.mark.parametrize("place", ["hub:", "hub:a/b/c", "hub:a b", "oci:", "oci:x:a b", "s3:x", "org/tiny"])
def test_a_destination_that_is_none(bundle: Path, fails: Fails, place: str) -> None:
    fails(["publish", str(bundle), place], 2, "write ")


def test_the_hubs_own_command_downloads_a_bundle(hub: FakeHub, bundle: Path, tmp_path: Path) -> None:
    assert run(publish(bundle)) == 0
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("HF_")
    } | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    target = tmp_path / "downloaded"
    command = [Path(sys.executable).with_name("hf"), "download", REPOSITORY, "--local-dir", target]
    done = subprocess.run(
        [*command, "--exclude", ".gitattributes"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    shutil.rmtree(target / ".cache")
    assert contents(open_bundle(target).folder) == contents(bundle)
