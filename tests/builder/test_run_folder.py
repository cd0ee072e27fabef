"""Stages: run once for a key, stamped last, thrown away when half done, one process at a time."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from builder import run_folder
from builder.run_folder import MARKER, STAMP, clear, is_done, locked, refusals_named, stage_key
from serving.errors import GPT2BundleError, InputError
from tests.tiny_build import contents


def run_stage(folder: Path, key: str, work: Callable[[Path], None], keep: tuple[str, ...] = ()) -> bool:
    return run_folder.run_stage(folder, key, work, writes=("out", "half", "deep"), keep=keep)


class Work:
    """A stage that writes one file and counts its runs."""

    def __init__(self, fail: bool = False) -> None:
        self.runs, self.fail = 0, fail

    def __call__(self, folder: Path) -> None:
        self.runs += 1
        assert not (folder / STAMP).exists(), "stamped before the work was done"
        (folder / "out").write_text(str(self.runs))
        if self.fail:
            raise RuntimeError("broken off")


def test_a_key_is_of_every_part_and_of_their_order() -> None:
    keys = [stage_key(1, "a"), stage_key(1, "b"), stage_key("a", 1), stage_key([1, "a"]), stage_key("1", "a")]
    assert len(set(keys)) == len(keys)
    assert stage_key({"a": 1, "b": 2}) == stage_key({"b": 2, "a": 1})


def test_a_stage_runs_once_for_its_key(tmp_path: Path) -> None:
    folder, work = tmp_path / "deep" / "stage", Work()
    assert not is_done(folder, "k")
    assert run_stage(folder, "k", work)
    assert is_done(folder, "k") and not is_done(folder, "other")
    assert not run_stage(folder, "k", work)
    assert work.runs == 1
    assert run_stage(folder, "other", work)
    assert work.runs == 2 and is_done(folder, "other") and not is_done(folder, "k")


def test_what_an_earlier_run_left_is_removed_but_for_what_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    run_stage(folder, "k", Work(), keep=("keep",))
    (folder / "keep").mkdir()
    (folder / "keep" / "state").write_text("s")
    (folder / STAMP).unlink()
    (folder / "half").mkdir()
    (folder / "half" / "done").touch()
    run_stage(folder, "other", Work(), keep=("keep",))
    assert sorted(path.name for path in folder.iterdir()) == [MARKER, "keep", "out", STAMP]
    assert (folder / "keep" / "state").read_text() == "s"


def strange(folder: Path, kind: str) -> str:
    """Put something of the user's own into or in the place of a stage's folder; return a word of the refusal."""
    outside = folder.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "precious").write_text("x")
    if kind == "foreign folder":
        folder.mkdir(parents=True)
        (folder / "out").write_text("the user's own, of a name that the stage has too")
        return "out did not come from this stage"
    if kind == "link in place":
        folder.symlink_to(outside)
        return "a link, and a stage empties its folder"
    if kind == "file in place":
        folder.write_text("x")
        return "a file where a stage keeps its work"
    run_stage(folder, "k", lambda place: ((place / "deep").mkdir(), (place / "deep" / "out").touch()))  # type: ignore[func-returns-value]
    if kind == "file":
        (folder / "train.py").write_text("x")
        return "train.py did not come from this stage"
    if kind == "file, half done":
        (folder / STAMP).unlink()
        (folder / "train.py").write_text("x")
        return "train.py did not come"
    if kind == "link inside":
        (folder / "out").symlink_to(outside)
        return "out did not come"
    (folder / "deep" / "notes.txt").write_text("x")
    return "deep/notes.txt did not come"


KINDS = (
    "foreign folder",
    "link in place",
    "file in place",
    "file",
    "file, half done",
    "link inside",
    "file deep inside",
)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_stage_did_not_write_is_refused_and_stays(tmp_path: Path, kind: str) -> None:
    folder, work = tmp_path / "run" / "stage", Work()
    folder.parent.mkdir()
    words = strange(folder, kind)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=words):
        run_stage(folder, "other", work)
    assert contents(tmp_path) == before and work.runs == 0


def test_work_that_fails_leaves_no_stamp_and_is_done_again(tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    run_stage(folder, "k", Work())
    with pytest.raises(RuntimeError):
        run_stage(folder, "other", Work(fail=True))
    assert not is_done(folder, "other") and not is_done(folder, "k")
    assert run_stage(folder, "k", Work())


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b'{"key": 1}', b'{"kye": "k"}', b'{"key": "k"}', b'{"key": "k", "files": 3}', b"\xff\xfe"],
    ids=lambda content: repr(content),
)
def test_a_broken_stamp_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / STAMP).write_bytes(content)
    assert not is_done(tmp_path, "k")


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_clear_takes_the_stamp_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_stage(tmp_path / "stage", "k", lambda folder: (folder / "deep").mkdir())
    monkeypatch.setattr(shutil, "rmtree", interrupt)
    with pytest.raises(KeyboardInterrupt):
        clear(tmp_path / "stage", ("deep",))
    assert not is_done(tmp_path / "stage", "k") and (tmp_path / "stage" / "deep").exists()
    monkeypatch.undo()
    clear(tmp_path / "nowhere", ())
    assert not (tmp_path / "nowhere").exists()


CHILD = """
import os, sys
from pathlib import Path
from builder.run_folder import locked, run_stage

def work(folder):
    (folder / "half").touch()
    print("working", flush=True)
    sys.stdin.readline()

with locked(Path(sys.argv[1])):
    run_stage(Path(sys.argv[1]) / "stage", "k", work, writes=("half",))
"""


def test_a_kill_in_the_middle_leaves_no_stamp_and_no_lock(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "working\n"
        with pytest.raises(GPT2BundleError, match="another gpt2-bundle command works in") as caught, locked(run):
            pytest.fail("two processes in one run")
        assert caught.value.exit_code == 1
        os.kill(child.pid, signal.SIGKILL)
        child.wait(10)
    assert (run / "stage" / "half").exists() and not is_done(run / "stage", "k")
    with locked(run):
        assert run_stage(run / "stage", "k", Work())
    assert not (run / "stage" / "half").exists()
    assert json.loads((run / "stage" / STAMP).read_text()) == {"key": "k", "files": {"out": 1}}


def test_the_lock_goes_with_its_block(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path / "run"):
            pass
    with pytest.raises(RuntimeError), locked(tmp_path / "run"):
        raise RuntimeError
    with locked(tmp_path / "run"):
        pass


FULL = os.strerror(errno.ENOSPC)


@pytest.mark.parametrize(
    ("raised", "filename"),
    [
        (OSError(errno.ENOSPC, FULL), "the/stage"),
        (OSError(errno.ENOSPC, FULL, "a/file"), "a/file"),
        (OSError(errno.EACCES, "no"), "the/stage"),
        (shutil.Error([("a", "b", f"[Errno 28] {FULL}: 'a' -> 'b'")] * 9), "the/stage"),
        (RuntimeError(f"Error while serializing: I/O error: {FULL} (os error 28)"), "the/stage"),
    ],
)
def test_what_the_file_system_refuses_gets_a_name(raised: Exception, filename: str) -> None:
    with pytest.raises(OSError) as caught, refusals_named(Path("the/stage")):
        raise raised
    assert caught.value.filename == filename and caught.value.errno in (errno.ENOSPC, errno.EACCES)


def test_other_errors_stay_as_they_are() -> None:
    for error in (RuntimeError("broken"), GPT2BundleError(f"{FULL}, said the user"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, refusals_named(Path("the/stage")):
            raise error
        assert caught.value is error


@pytest.mark.parametrize("damage", ["missing", "cut", "grown"])
def test_a_stage_that_lost_a_file_since_is_not_done(tmp_path: Path, damage: str) -> None:
    def work(folder: Path) -> None:
        (folder / "kept").mkdir(exist_ok=True)
        (folder / "kept" / "state").write_text("anything")
        (folder / "deep").mkdir()
        (folder / "deep" / "out").write_text("work")

    folder = tmp_path / "stage"
    run_stage(folder, "k", work, keep=("kept",))
    (folder / "kept" / "state").unlink()
    assert is_done(folder, "k"), "what is kept is not the stage's output"
    path = folder / "deep" / "out"
    if damage == "missing":
        path.unlink()
    else:
        path.write_text("wor" if damage == "cut" else "worked")
    assert not is_done(folder, "k")
    assert run_stage(folder, "k", work, keep=("kept",)) and path.read_text() == "work"
