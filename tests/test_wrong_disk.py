"""Folders that cannot be written and disks that fill up: one line, and what was there stays."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.cli import run
from tests.tiny_build import Fails, TinyBuild, contents

STAGES = ("prepare", "train", "export", "verify", "build")


@pytest.mark.parametrize("command", STAGES)
def test_a_file_where_the_runs_should_be(fails: Fails, fresh: TinyBuild, command: str) -> None:
    arguments = fresh.build() if command == "build" else [command, *fresh.options()]
    for folder in (fresh.corpus, fresh.corpus / "below"):
        arguments[arguments.index("--runs") + 1] = str(folder)
        fails(arguments, 1, "corpus.txt")


def test_a_folder_of_the_system(fails: Fails, fresh: TinyBuild) -> None:
    arguments = fresh.build()
    for option in ("--runs", "--output"):
        changed = list(arguments)
        changed[changed.index(option) + 1] = "/proc/none"
        fails(changed, 1, "/proc/none")
    assert not (fresh.run / "prepare").exists(), "worked before it looked at the output"


def test_files_in_the_way_of_stages(fails: Fails, fresh: TinyBuild) -> None:
    fresh.run.mkdir(parents=True)
    (fresh.run / "prepare").write_text("mine")
    fails(["prepare", *fresh.options()], 2, "prepare", "move it away")
    assert (fresh.run / "prepare").read_text() == "mine"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A function that mounts a file system of so many bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("a small file system cannot be mounted here")
        return folder

    yield mount
    if folder.is_mount():
        # Lazily: the tokens' memory maps may still be open.
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full_from_the_start(fails: Fails, fresh: TinyBuild, small_disk: Any) -> None:
    disk = small_disk(16 * 1024)
    arguments = fresh.build()
    arguments[arguments.index("--runs") + 1] = str(disk)
    fails(arguments, 1, "No space left on device", "free some space", str(disk))


@pytest.mark.parametrize(
    "kilobytes", [40, pytest.param(100, marks=pytest.mark.slow), 1100, pytest.param(1400, marks=pytest.mark.slow)]
)
def test_a_disk_that_fills_up_on_the_way(
    fails: Fails, built: TinyBuild, tmp_path: Path, small_disk: Any, kilobytes: int
) -> None:
    """In preparing, in training, in exporting each kind of graph: the old bundle stays, and space lets it go on."""
    disk = small_disk(kilobytes * 1024)
    tiny = TinyBuild(built.corpus, disk / "runs", tmp_path / "dist")
    shutil.copytree(built.bundle, tiny.bundle)
    before = contents(tiny.dist)
    fails(tiny.build(), 1, "No space left on device", "free some space", str(disk))
    assert contents(tiny.dist) == before
    if kilobytes == 100:
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert run(tiny.build()) == 0
        assert os.listdir(tiny.dist) == ["tiny"]  # noqa: PTH208 (all names, hidden ones too)


@pytest.mark.slow
def test_a_full_disk_under_the_output(fails: Fails, tiny: TinyBuild, small_disk: Any) -> None:
    disk = small_disk(256 * 1024)
    arguments = tiny.build("verify.max_abs=5e-4")
    arguments[arguments.index("--output") + 1] = str(disk)
    assert len(fails(arguments, 1, "No space left on device", str(disk))) < 300
    assert list(disk.iterdir()) == []


def test_a_read_only_disk(fails: Fails, tiny: TinyBuild, small_disk: Any) -> None:
    disk = small_disk(256 * 1024)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for option in ("--runs", "--output"):
        arguments = tiny.build("verify.max_abs=5e-4")
        arguments[arguments.index(option) + 1] = str(disk)
        fails(arguments, 1, "disk", "choose a folder")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EROFS])
def test_what_the_disk_refuses_is_said_with_its_file(
    fails: Fails, fresh: TinyBuild, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), "the/file")

    monkeypatch.setattr("builder.stages.prepare.write_tokens", refuse)
    fails(["prepare", *fresh.options()], 1, os.strerror(number), "the/file")
