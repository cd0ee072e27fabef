"""Fixtures of every test: what takes seconds to make is made once a run."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.tiny_build import Fails, TinyBuild, write_corpus

# A test that reads the standard error stream may run after one that loads TensorFlow by its official messages.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The same examples in every run; a stopwatch would fail on a busy machine.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")
_LOGGERS = ("gpt2_bundle", "gpt2_bundle.access", "serving", "uvicorn")


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    """The server's loggers as they were, after each test: `serve` configures them for its process."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    kept = [(logger, logger.handlers, logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, handlers, level, propagate in kept:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` as `make` filled it: once a run, whichever of pytest-xdist's processes asks first."""
    base = factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    folder, done = shared / name, shared / f"{name}.done"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def real_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a bundle with real graphs of the fixture "bytes"; nobody may change it."""
    from tests.oracles.tiny_bundle import write_real_bundle

    return make_once(tmp_path_factory, "bytes", write_real_bundle)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> TinyBuild:
    """A build that ran to its end; work on a copy of it."""
    from serving.cli import run

    def tiny_build(folder: Path) -> TinyBuild:
        return TinyBuild(folder / "corpus.txt", folder / "runs", folder / "dist")

    def make(folder: Path) -> None:
        write_corpus(folder / "corpus.txt")
        assert run(tiny_build(folder).build()) == 0

    return tiny_build(make_once(tmp_path_factory, "built", make))


@pytest.fixture
def fresh(tmp_path: Path) -> TinyBuild:
    """A tiny build of which nothing is done."""
    return TinyBuild(write_corpus(tmp_path / "corpus.txt"), tmp_path / "runs", tmp_path / "dist")


@pytest.fixture
def tiny(built: TinyBuild, tmp_path: Path) -> TinyBuild:
    """A copy of a build that is prepared, trained and published."""
    return built.copy(tmp_path)


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str]) -> Fails:
    """Run a command that must fail with this exit code and these words; return its one line."""
    from serving.cli import run

    def check(arguments: list[str], code: int, *words: str) -> str:
        capfd.readouterr()
        got = run(arguments)
        _, err = capfd.readouterr()
        assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
        assert "Traceback" not in err and "internal error" not in err, err
        assert got == code, err
        for word in words:
            assert word in err, err
        return err

    return check
