"""Each sampling parameter is declared once, and all that is made from the declarations agrees with them."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import pytest

from serving.clients.slot_pool import UNSUPPORTED
from serving.commands.client import client
from serving.commands.generate import generate
from serving.errors import InputError
from serving.protocols.open_inference.signatures import GENERATE, SPECS
from serving.protocols.openai.chat_schema import ChatRequest
from serving.protocols.openai.schema import CompletionRequest
from serving.sampling import DECLARATIONS, SamplingParams, SamplingRows
from serving.sampling.reference import page

PAGE = Path(__file__).parents[3] / "docs" / "sampling.md"


def test_the_reference_page_is_what_the_declarations_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


@pytest.mark.parametrize("name", DECLARATIONS)
def test_a_declared_parameter_reaches_every_interface(name: str) -> None:
    each = DECLARATIONS[name]
    assert getattr(SamplingParams(), name) == each.default
    options = {option.name: option for option in generate.params}
    option = options[name]
    assert isinstance(option, click.Option) and each.help in (option.help or "")
    assert option.is_flag if each.kind == "boolean" else option.default == each.default
    inputs, _ = SPECS[GENERATE]
    assert inputs[each.wire].datatype == each.datatype
    command = client.commands["generate"]
    assert (name in {option.name for option in command.params}) == each.slots == (name not in UNSUPPORTED)
    assert isinstance(command, click.Command)
    for body in (CompletionRequest, ChatRequest):
        field = body.model_json_schema()["properties"][each.wire]
        if each.kind == "boolean":
            continue
        numbers = {**field, **next(kind for kind in field["anyOf"] if kind["type"] != "null")}
        low = numbers.get("exclusiveMinimum" if each.above_low else "minimum")
        # "-1" is "not given" for two of them in requests; how many tokens are asked for has a check of its own.
        assert low == each.low or name in ("top_k", "seed", "max_new_tokens")
        assert numbers["maximum"] == each.high


@pytest.mark.parametrize("name", [name for name, each in DECLARATIONS.items() if each.kind != "boolean"])
def test_bounds_hold(name: str) -> None:
    each = DECLARATIONS[name]
    for inside in {each.high} if each.above_low else {each.low, each.high}:
        value = int(inside) if each.kind == "integer" else inside
        assert getattr(SamplingParams(**{name: value}), name) == value
    past = each.high + 1 if each.kind == "number" else int(each.high) + 1
    for outside in (past, each.low if each.above_low else each.low - 1, float("nan"), "1", None, True):
        with pytest.raises(InputError, match=f"^{name} is "):
            SamplingParams(**{name: outside})


def test_rows_are_those_of_the_parameters() -> None:
    params = [SamplingParams(temperature=0.5, top_k=3), SamplingParams(temperature=1.5, min_p=0.25, top_p=0.5)]
    rows = SamplingRows.of(params)
    assert rows.greedy.tolist() == [False, False] and SamplingRows.of([SamplingParams()]).greedy.all()
    taken = rows.take(np.array([1, 0, 1]))
    assert {name: array.tolist() for name, array in taken.arrays().items()} == {
        "temperature": [1.5, 0.5, 1.5],
        "top_k": [0, 3, 0],
        "top_p": [0.5, 1.0, 0.5],
        "min_p": [0.25, 0.0, 0.25],
    }
    assert taken.top_k.dtype == np.int64 and taken.top_p.dtype == np.float32
