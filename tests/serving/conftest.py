"""Fixtures of the serving side's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.closed_form import write_bundle


@pytest.fixture
def bundle_folder(tmp_path: Path) -> Path:
    """A small, whole bundle."""
    folder = tmp_path / "tiny"
    write_bundle(folder)
    return folder
