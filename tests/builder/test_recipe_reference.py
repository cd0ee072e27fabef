"""The reference of recipe keys: complete, as committed, and printed by the command."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from builder.recipe import FINE_TUNING, Recipe
from builder.recipe_reader import read_recipe
from builder.recipe_reference import PAGE, find_keys, markdown, recipe_keys
from serving.cli import run
from tests.tiny_build import Fails

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_dataclasses_say() -> None:
    assert (ROOT / PAGE).read_text(encoding="utf-8") == markdown(), "run python -m builder.recipe_reference"


def test_each_default_is_toml_that_reads_as_the_recipe_without_it() -> None:
    keys = list(recipe_keys())
    assert len({key.name for key in keys}) == len(keys) > 80
    for key in keys:
        value = tomllib.loads(f"value = {key.default}")["value"]
        found: object = Recipe()
        for part in key.name.split("."):
            found = getattr(found, part)
        assert found == (tuple(value) if isinstance(value, list) else value), key.name
    assert {key.name.removeprefix("training.") for key in keys if key.base_default} == set(FINE_TUNING)


def test_each_default_can_be_set() -> None:
    for key in recipe_keys():
        if key.name not in ("training.momentum", "name"):
            read_recipe(None, [f"{key.name}={key.default}"])


def test_the_command_prints_keys(capfd: pytest.CaptureFixture[str], fails: Fails) -> None:
    assert run(["recipe", "training.epochs"]) == 0
    out = capfd.readouterr().out
    assert out.startswith("training.epochs: number, default 4.0 (with model.base: 3.0)\n") and "from 0.0 to" in out
    assert run(["recipe", "corpus", "--json"]) == 0
    record = json.loads(capfd.readouterr().out)
    assert [each["name"] for each in record] == [key.name for key in find_keys("corpus")]
    assert run(["recipe"]) == 0
    assert capfd.readouterr().out.count("default ") >= len(list(recipe_keys()))
    fails(["recipe", "epochs"], 2, "no recipe key 'epochs'; did you mean 'training.epochs'?")
    fails(["recipe", "training.epoch"], 2, "'training.epochs'")
