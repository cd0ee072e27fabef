"""Fixtures of every test: what takes seconds to make is made once a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_build import TinyBuild, write_corpus


@pytest.fixture(scope="session")
def real_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a bundle with real graphs of the fixture "bytes"; nobody may change it."""
    from tests.oracles.tiny_bundle import write_real_bundle

    folder = tmp_path_factory.mktemp("bundles") / "bytes"
    write_real_bundle(folder)
    return folder


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> TinyBuild:
    """A build that ran to its end; work on a copy of it."""
    from serving.cli import run

    folder = tmp_path_factory.mktemp("built")
    build = TinyBuild(write_corpus(folder / "corpus.txt"), folder / "runs", folder / "dist")
    assert run(build.build()) == 0
    return build
