"""Publishing: the old bundle or the new one, never half of one, whatever happens in between."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serving.bundle import open_bundle, publish, publishing
from serving.errors import BundleError, InputError
from tests.closed_form import write_bundle


def write_both(tmp_path: Path) -> tuple[Path, Path]:
    """A staged bundle "new" and a published one "old"."""
    staged, final = tmp_path / "work" / "stage", tmp_path / "dist" / "tiny"
    write_bundle(staged, "new")
    write_bundle(final, "old")
    return staged, final


def no_exchange(first: Path, second: Path) -> bool:
    return False


@pytest.mark.parametrize("exchange", [True, False])
def test_publish_replaces_a_bundle(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    staged, final = write_both(tmp_path)
    if not exchange:
        monkeypatch.setattr(publishing, "_exchange", no_exchange)
    assert publish(staged, final) == final
    assert open_bundle(final).manifest.name == "new"
    assert not staged.exists()
    assert [path.name for path in final.parent.iterdir()] == ["tiny"]


def test_publish_to_new_and_empty_and_linked_places(tmp_path: Path) -> None:
    for name in ("deep/er/new", "empty"):
        write_bundle(tmp_path / "stage")
        if name == "empty":
            (tmp_path / name).mkdir()
        publish(tmp_path / "stage", tmp_path / name)
        assert open_bundle(tmp_path / name).manifest.name == "tiny"
    (tmp_path / "link").symlink_to("empty")
    write_bundle(tmp_path / "stage", "second")
    publish(tmp_path / "stage", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert open_bundle(tmp_path / "empty").manifest.name == "second"


def test_publish_refuses_to_destroy(tmp_path: Path) -> None:
    staged, final = write_both(tmp_path)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "manifest.json").write_text('{"name": "a web page"}')
    for place, message in [
        (mine, "not a bundle"),
        (mine / "manifest.json", "there is a file"),
        (staged, "overlaps"),
        (staged / "inside", "overlaps"),
        (staged.parent, "overlaps"),
    ]:
        with pytest.raises(InputError, match=message):
            publish(staged, place)
    assert (mine / "manifest.json").exists()
    (staged / "manifest.json").unlink()
    with pytest.raises(BundleError, match="nothing to publish"):
        publish(staged, final)
    assert open_bundle(final).manifest.name == "old"


@pytest.mark.parametrize("exchange", [True, False])
def test_publish_across_file_systems(tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    staged, final = write_both(tmp_path)
    real_rename, real_exchange = Path.rename, publishing._exchange

    def crosses(first: Path, second: Path) -> None:
        if (first.parent == staged.parent) != (Path(second).parent == staged.parent):
            raise OSError(errno.EXDEV, "Invalid cross-device link")

    def rename(self: Path, target: Path) -> Path:
        crosses(self, target)
        return real_rename(self, target)

    def swap(first: Path, second: Path) -> bool:
        crosses(first, second)
        return real_exchange(first, second) if exchange else False

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(publishing, "_exchange", swap)
    publish(staged, final)
    assert open_bundle(final).manifest.name == "new"
    assert not staged.exists()
    assert [path.name for path in final.parent.iterdir()] == ["tiny"]


@pytest.mark.parametrize("exchange", [True, False])
def test_failures_while_publishing_keep_the_old_bundle(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged, final = write_both(tmp_path)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self == staged:
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    def broken(first: Path, second: Path) -> bool:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(publishing, "_exchange", broken if exchange else no_exchange)
    with pytest.raises(OSError, match="Input/output"):
        publish(staged, final)
    assert open_bundle(final).manifest.name == "old"
    assert open_bundle(staged).manifest.name == "new"


PUBLISHER = """
import sys
from pathlib import Path
from serving.bundle import publish
from tests.closed_form import write_bundle
print("ready", flush=True)
for round in range(1000):
    write_bundle(Path("stage"), f"round-{round}")
    publish(Path("stage"), Path("dist/tiny"))
"""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX signals")
def test_a_killed_publisher_leaves_a_whole_bundle(tmp_path: Path) -> None:
    write_bundle(tmp_path / "dist" / "tiny")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    for attempt in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", PUBLISHER], cwd=tmp_path, env=environment, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.03 + 0.037 * attempt)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert open_bundle(tmp_path / "dist" / "tiny").manifest.name
        assert [path.name for path in (tmp_path / "dist").iterdir()] == ["tiny"]
