"""What TensorFlow Serving does to a batch changes no row: requests merged, widened, and padded with more rows.

Its batching joins requests along the first axis, pads them to a common width with a value of their own
(`pad_variable_length_inputs`) and repeats a row until the batch has an allowed size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builder.tf_export.savedmodel_calls import Call, columns, padded, session_call

VOCABULARY, LIMIT = 257, 48
TOLERANCE = 1e-4
Request = dict[str, Any]

_prompt = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=20)
_parameters = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(1, 12),
        "temperature": st.sampled_from([0.0, 0.7, 1.5]),
        "top_k": st.sampled_from([0, 3, 300]),
        "top_p": st.sampled_from([0.5, 1.0]),
        "seed": st.integers(0, 2**63 - 1),
    }
)
_requests = st.lists(st.lists(st.tuples(_prompt, _parameters), min_size=1, max_size=3), min_size=1, max_size=4)
_filler = st.sampled_from(["zero", "first"])
_extra_rows, _extra_width = st.integers(0, 3), st.integers(0, 9)


@pytest.fixture(scope="module")
def serve(real_bundle: Path) -> Call:
    return session_call(str(real_bundle / "savedmodel/1"))


def merged(requests: list[Request], filler: str, rows: int, width: int) -> Request:
    """One batch of all requests: `width` columns and `rows` copies of the first row more than they need."""
    batch = {}
    for name in requests[0]:
        parts = [request[name] for request in requests]
        if parts[0].ndim == 2:
            widest = max(part.shape[1] for part in parts) + width
            parts = [widened(part, widest, part[0, 0] if filler == "first" else 0) for part in parts]
        joined = np.concatenate(parts)
        batch[name] = np.concatenate([joined, np.repeat(joined[:1], rows, axis=0)])
    return batch


def widened(part: Any, width: int, value: int) -> Any:
    return np.pad(part, [(0, 0), (0, width - part.shape[1])], constant_values=value)


def split(outputs: dict[str, Any], requests: list[Request]) -> list[dict[str, Any]]:
    ends = np.cumsum([len(next(iter(request.values()))) for request in requests])
    parts = {name: np.split(value, ends)[: len(requests)] for name, value in outputs.items()}
    return [{name: values[place] for name, values in parts.items()} for place in range(len(requests))]


def token_rows(outputs: dict[str, Any]) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(outputs["token_ids"], outputs["lengths"], strict=True)]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(drawn=_requests, filler=_filler, rows=_extra_rows, width=_extra_width)
def test_serving_default(serve: Call, drawn: list[list[Any]], filler: str, rows: int, width: int) -> None:
    requests = [padded([ids for ids, _ in one]) | columns([options for _, options in one]) for one in drawn]
    together = serve("serving_default", **merged(requests, filler, rows, width))
    for request, outputs in zip(requests, split(together, requests), strict=True):
        assert token_rows(outputs) == token_rows(serve("serving_default", **request))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    drawn=st.lists(st.lists(st.tuples(st.binary(min_size=1, max_size=16), _parameters), min_size=1, max_size=3),
                   min_size=1, max_size=4), rows=_extra_rows,
)  # fmt: skip
def test_generate_text(serve: Call, drawn: list[list[Any]], rows: int) -> None:
    requests = [
        {"text": np.array([text for text, _ in one], np.object_), **columns([options for _, options in one])}
        for one in drawn
    ]
    together = serve("generate_text", **merged(requests, "zero", rows, 0))
    for request, outputs in zip(requests, split(together, requests), strict=True):
        alone = serve("generate_text", **request)
        assert {name: value.tolist() for name, value in outputs.items()} == {
            name: value.tolist() for name, value in alone.items()
        }


@settings(max_examples=25, deadline=None, derandomize=True)
@given(drawn=_requests, filler=_filler, rows=_extra_rows, width=_extra_width)
def test_prefill_and_a_step_behind_it(serve: Call, drawn: list[list[Any]], filler: str, rows: int, width: int) -> None:
    requests = [padded([ids for ids, _ in one]) | {"capacity": np.full(len(one), LIMIT, np.int32)} for one in drawn]
    batch = merged(requests, filler, rows, width)
    together = serve("prefill", **batch)
    steps = [step(request, serve("prefill", **request)) for request in requests]
    next_together = serve("decode", **step(batch, together))
    for request, given_, outputs, behind in zip(
        requests, steps, split(together, requests), split(next_together, requests), strict=True
    ):
        alone = serve("prefill", **request)
        close(outputs["logits"], alone["logits"])
        for row, length in enumerate(request["lengths"]):
            for name in alone.keys() - {"logits"}:
                close(outputs[name][row, :, :length], alone[name][row, :, :length])
        close(behind["logits"], serve("decode", **given_)["logits"])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(drawn=_requests, filler=_filler, rows=_extra_rows, width=_extra_width)
def test_score(serve: Call, drawn: list[list[Any]], filler: str, rows: int, width: int) -> None:
    requests = [padded([ids for ids, _ in one]) for one in drawn]
    together = serve("score", **merged(requests, filler, rows, width))
    for request, outputs in zip(requests, split(together, requests), strict=True):
        alone = serve("score", **request)
        shared = alone["log_probs"].shape[1]
        close(outputs["log_probs"][:, :shared], alone["log_probs"])
        assert (outputs["log_probs"][:, shared:] == 0).all()
        close(outputs["total"], alone["total"])


def step(request: Request, outputs: dict[str, Any]) -> Request:
    """The inputs of one `decode` behind a prefill: a token that follows from the row's own prompt."""
    cache = {name: value for name, value in outputs.items() if name != "logits"}
    return {"token_ids": request["token_ids"][:, 0], "lengths": request["lengths"], **cache}


def close(mine: Any, alone: Any) -> None:
    assert mine.shape == alone.shape and np.abs(mine - alone).max(initial=0) < TOLERANCE
