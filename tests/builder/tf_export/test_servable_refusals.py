"""Every request that breaks a bound fails as INVALID_ARGUMENT, in a sentence, whatever else would fail first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.builder.tf_export.savedmodel_calls import CACHE, Call, assert_refused, columns, padded

BAD_PROMPTS: dict[str, tuple[dict[str, Any], str]] = {
    "empty row": ({"lengths": [2, 0]}, "lengths must be at least 1: a prompt may not be empty"),
    "negative length": ({"lengths": [2, -1]}, "lengths must be at least 1: a prompt may not be empty"),
    "length beyond width": ({"lengths": [2, 4]}, "lengths must not pass the end of token_ids"),
    "id too large": ({"token_ids": [[1, 2, 3], [1, 2, 257]]}, "token_ids must be from 0 to 256, padding included"),
    "negative id": ({"token_ids": [[1, -1, 3], [1, 2, 3]]}, "token_ids must be from 0 to 256, padding included"),
    "too long": ({"token_ids": [[1] * 49] * 2}, "the prompt is longer than the context of 48 tokens"),
    "one length": ({"lengths": [2]}, "lengths must have one value for each row of token_ids"),
    "no width": ({"token_ids": [[], []], "lengths": [0, 0]}, "a prompt may not be empty"),
}
BAD_PARAMETERS: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": ({"max_new_tokens": [5, 0]}, "max_new_tokens must be at least 1"),
    "temperature below 0": ({"temperature": [0.0, -0.5]}, "temperature must be a finite number, 0 or more"),
    "temperature nan": ({"temperature": [np.nan, 0.0]}, "temperature must be a finite number, 0 or more"),
    "temperature infinite": ({"temperature": [0.0, np.inf]}, "temperature must be a finite number, 0 or more"),
    "top_k below 0": ({"top_k": [0, -1]}, "top_k must be 0 (off) or more"),
    "top_p 0": ({"top_p": [1.0, 0.0]}, "top_p must be above 0 and at most 1"),
    "top_p above 1": ({"top_p": [1.01, 1.0]}, "top_p must be above 0 and at most 1"),
    "top_p nan": ({"top_p": [1.0, np.nan]}, "top_p must be above 0 and at most 1"),
    "one seed": ({"seed": [1]}, "seed must have one value for each row of token_ids"),
    "three temperatures": ({"temperature": [1.0] * 3}, "temperature must have one value for each row of token_ids"),
}
BAD_CAPACITIES: dict[str, tuple[dict[str, Any], str]] = {
    "too small": ({"capacity": [2, 2]}, "capacity must hold the padded prompt"),
    "too large": ({"capacity": [8, 49]}, "capacity must be at most 48"),
    "one": ({"capacity": [8]}, "capacity must have one value for each row of token_ids"),
}


def replaced(inputs: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return inputs | {key: np.array(value, inputs[key].dtype) for key, value in changes.items()}


@pytest.mark.parametrize("case", BAD_PROMPTS)
@pytest.mark.parametrize("signature", ["serving_default", "prefill", "score"])
def test_bad_prompts_are_refused_in_a_sentence(call: Call, signature: str, case: str) -> None:
    changes, sentence = BAD_PROMPTS[case]
    inputs = padded([[1, 2, 3], [4, 5]])
    inputs |= {"serving_default": columns([{}, {}]), "prefill": {"capacity": np.array([8, 8], np.int32)}}.get(
        signature, {}
    )
    call(signature, **inputs)
    assert_refused(call, sentence, signature, replaced(inputs, changes))


@pytest.mark.parametrize("case", [*BAD_PARAMETERS, *BAD_CAPACITIES])
def test_bad_parameters_are_refused_in_a_sentence(call: Call, case: str) -> None:
    changes, sentence = (BAD_PARAMETERS | BAD_CAPACITIES)[case]
    inputs = padded([[1, 2, 3], [4, 5]])
    if case in BAD_CAPACITIES:
        inputs["capacity"] = np.array([8, 8], np.int32)
        assert_refused(call, sentence, "prefill", replaced(inputs, changes))
    else:
        assert_refused(call, sentence, "serving_default", replaced(inputs | columns([{}, {}]), changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"token_ids": [1, 257]}, "token_ids must be from 0 to 256"),
        ({"token_ids": [-1, 1]}, "token_ids must be from 0 to 256"),
        ({"lengths": [-1, 1]}, "lengths must be 0 or more"),
        ({"lengths": [9, 8]}, "the cache is full; prefill with a larger capacity"),
        ({"lengths": [1]}, "lengths must have one value for each row of token_ids"),
        ({"token_ids": [1, 2, 3], "lengths": [1, 2, 3]}, "must have one value for each row of token_ids"),
    ],
)
def test_bad_steps_are_refused_in_a_sentence(call: Call, changes: dict[str, Any], sentence: str) -> None:
    inputs = {"token_ids": np.array([1, 2], np.int32), "lengths": np.array([1, 2], np.int32)}
    inputs |= {name: np.zeros((2, 3, 9, 8), np.float32) for name in CACHE}
    call("decode", **inputs)
    assert_refused(call, sentence, "decode", replaced(inputs, changes))
