"""The ops of every kind of export are in the one list that loaders, lint and deploy hold a SavedModel against."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from builder.progress import Reporter
from builder.recipe import ExportRecipe
from builder.stages.export import servable
from serving.protobuf.saved_model_ops import find_problems
from tests.closed_form import byte_tokenizer
from tests.oracles.fixtures import keras_model
from tests.tiny_build import TinyBuild

ADVICE = (
    "add the op to ALLOWED_OPS in serving/protobuf/saved_model_ops.py if it opens no file and calls no foreign code"
)


def test_a_build(built: TinyBuild) -> None:
    assert [*find_problems(built.bundle / "savedmodel/1")] == [], ADVICE


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"matmul_parts": 2}, {"slots": 0}])
def test_other_exports(changes: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer().to_str(), encoding="utf-8")
    recipe = dataclasses.replace(ExportRecipe(), **changes)
    servable(keras_model("odd_heads"), tmp_path, recipe, Reporter()).save(tmp_path / "1")
    assert [*find_problems(tmp_path / "1")] == [], ADVICE
