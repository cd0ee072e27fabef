"""Graphs of the fixture models, traced and loaded once a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.builder.tf_export.savedmodel_calls import Call, loaded_call, session_call
from tests.oracles.fixtures import FOLDER, keras_model
from tests.oracles.tiny_bundle import trace_optimized, trace_portable


@pytest.fixture(autouse=True)
def forget_downloads() -> None:
    """Each test is a process of its own to the hub."""
    from builder.model.hub import download

    download.cache_clear()


@pytest.fixture(scope="session")
def graph_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A function from a fixture's name and "portable" or "optimized" to the written graph."""
    from builder.onnx_export.external_data import write_graph

    folder = tmp_path_factory.mktemp("graphs")

    def path(name: str, kind: str) -> Path:
        target = folder / name / kind / "model.onnx"
        if not target.exists():
            traced = {"portable": trace_portable, "optimized": trace_optimized}[kind](keras_model(name))
            write_graph(traced, FOLDER / name / "model.safetensors", target)
        return target

    return path


@pytest.fixture(scope="session", params=[session_call, loaded_call])
def call(request: pytest.FixtureRequest, real_bundle: Path) -> Call:
    """The bundle's SavedModel, in each of the ways to run it."""
    run: Call = request.param(str(real_bundle / "savedmodel/1"))
    return run
