"""Fixtures of the serving side's tests."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from serving.generation.pacing import Pacing
from tests.closed_form import write_bundle


@pytest.fixture
def bundle_folder(tmp_path: Path) -> Path:
    """A small, whole bundle."""
    folder = tmp_path / "tiny"
    write_bundle(folder)
    return folder


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draft that can be made is verified: drafts never pause, and need no expected gain."""
    unmeasured = functools.partial(Pacing, measured=False)
    monkeypatch.setattr("serving.engine.speculation.Pacing", unmeasured)
    monkeypatch.setattr("serving.generation.speculative_decode.Pacing", unmeasured)
    monkeypatch.setattr("serving.generation.drafts._LEAST_GAIN", 0.0)
