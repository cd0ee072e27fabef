"""The tutorial, run from top to bottom as a reader runs it; kubectl alone is left out."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, commands_of

GUIDES = ROOT / "docs" / "guides"


def commands(page: str) -> list[tuple[str, ...]]:
    return [command.words for command in commands_of(GUIDES / page)]


def test_both_languages_have_the_same_commands() -> None:
    assert commands("tutorial.md") == commands("tutorial.zh-CN.md")


@contextlib.contextmanager
def started(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """A server that runs inside, ready at port 8000."""
    with subprocess.Popen(command, cwd=folder, env=environment) as server:
        try:
            for _ in range(600):
                assert server.poll() is None, "the server ended"
                with contextlib.suppress(OSError), urllib.request.urlopen("http://127.0.0.1:8000/health/ready"):
                    break
                time.sleep(0.1)
            else:
                raise AssertionError("the server was not ready in a minute")
            yield
        finally:
            server.terminate()


@pytest.mark.slow
def test_the_tutorial_runs_from_top_to_bottom(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    for page in sorted((ROOT / "docs").rglob("*.md")):
        shutil.copy(page, notes / f"{page.parent.name}-{page.name}")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = commands("tutorial.md")
    with contextlib.ExitStack() as running:
        for each in words:
            if each[0] == "kubectl":
                assert (tmp_path / each[-1]).exists(), each
                continue
            command = [sys.executable, "-m", "serving.cli", *each[1:]] if each[0] == "gpt2-bundle" else [*each]
            if each[:2] == ("gpt2-bundle", "serve"):
                running.enter_context(started(command, tmp_path, environment))
                continue
            if each[:2] == ("gpt2-bundle", "bench"):
                running.close()
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
            assert done.returncode == 0, (each, done.stderr[-2000:])
            if each[0] == "curl":
                assert "[DONE]" in done.stdout or "gpt2_bundle_" in done.stdout, each
    assert (tmp_path / "runs" / "notes-bench.html").is_file()
    for path in ("dist/notes/verification.json", "k8s/kustomization.yaml", "tfserving/run.sh"):
        assert (tmp_path / path).is_file(), path
