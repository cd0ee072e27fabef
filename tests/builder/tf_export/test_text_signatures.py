"""`generate_text`: text in, text out, by the tokens that `serving_default` makes of the library's encoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers

from builder.keras_backend import tf
from builder.progress import Reporter
from builder.recipe import ExportRecipe
from builder.stages.export import servable
from builder.tf_export.graph_tokenizer import GraphTokenizer
from builder.tf_export.input_checks import PARAMETERS
from builder.tf_export.text_signatures import TextSignatures
from tests.builder.tf_export.savedmodel_calls import Call, assert_refused, columns, padded
from tests.closed_form import byte_tokenizer
from tests.oracles.fixtures import keras_model

LIMIT, END = 48, 256
TOKENIZER: Tokenizer = byte_tokenizer()
PROMPTS = [
    b"Return the",
    b"x",
    b"caf\xc3\xa9 \xf0\x9f\x91\x8b",
    b"cut \xf0\x9f\x91",
    b"a<|endoftext|>b",
    b"<|endoftext|>",
    b" " * 9,
    b"\x00\n",
]
ROWS: list[dict[str, Any]] = [
    {"max_new_tokens": 40}, {"max_new_tokens": 1}, {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "top_k": 40, "seed": 2**62}, {"temperature": 1.0, "top_p": 0.9, "seed": 9},
    {"max_new_tokens": 30}, {"max_new_tokens": 1000, "temperature": 2.0}, {},
]  # fmt: skip


def text_of(prompts: list[bytes]) -> dict[str, Any]:
    return {"text": np.array(prompts, np.object_)}


def encoded(prompts: list[bytes]) -> list[list[int]]:
    return [TOKENIZER.encode(prompt.decode("utf-8", "replace"), add_special_tokens=False).ids for prompt in prompts]


def by_hand(call: Call, prompts: list[bytes], rows: list[dict[str, Any]]) -> list[tuple[str, int, int, str]]:
    """The same from `serving_default` and the library."""
    ids = encoded(prompts)
    outputs = call("serving_default", **padded(ids), **columns(rows))
    made = [row[:length].tolist() for row, length in zip(outputs["token_ids"], outputs["lengths"], strict=True)]
    return [
        (TOKENIZER.decode(tokens), len(tokens), len(prompt), "stop" if tokens[-1:] == [END] else "length")
        for tokens, prompt in zip(made, ids, strict=True)
    ]


def by_graph(call: Call, prompts: list[bytes], rows: list[dict[str, Any]]) -> list[tuple[str, int, int, str]]:
    outputs = call("generate_text", **text_of(prompts), **columns(rows))
    assert all(value.shape == (len(prompts),) for value in outputs.values())
    names = ("text", "lengths", "prompt_tokens", "finish_reason")
    return [
        (text.decode("utf-8"), int(length), int(prompt), reason.decode())
        for text, length, prompt, reason in zip(*(outputs[name] for name in names), strict=True)
    ]


def test_the_text_is_that_of_the_tokens(call: Call) -> None:
    answers = by_graph(call, PROMPTS, ROWS)
    assert answers == by_hand(call, PROMPTS, ROWS)
    assert len({answer[0] for answer in answers}) > 4 and any("\ufffd" in answer[0] for answer in answers)


def test_a_row_that_ends_says_so(call: Call) -> None:
    rows: list[dict[str, Any]] = [{"max_new_tokens": 40, "temperature": 1.5, "seed": seed} for seed in range(60)]
    answers = by_graph(call, [b"\x01\x02\x03"] * 60, rows)
    assert answers == by_hand(call, [b"\x01\x02\x03"] * 60, rows)
    assert {answer[3] for answer in answers} == {"stop", "length"}


def test_a_full_context_leaves_no_room(call: Call) -> None:
    prompts = [b"a" * LIMIT, b"a" * (LIMIT - 1)]
    answers = by_graph(call, prompts, [{}, {}])
    assert answers == by_hand(call, prompts, [{}, {}])
    assert answers[0] == ("", 0, LIMIT, "length") and answers[1][1] == 1


def test_tokenize_and_detokenize(call: Call) -> None:
    outputs = call("tokenize", **text_of([*PROMPTS, b""]))
    ids, lengths = outputs["token_ids"], outputs["lengths"]
    assert [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)] == encoded([*PROMPTS, b""])
    assert all((row[length:] == END).all() for row, length in zip(ids, lengths, strict=True))
    texts = call("detokenize", token_ids=ids, lengths=lengths)["text"]
    assert [text.decode("utf-8") for text in texts] == [TOKENIZER.decode(row) for row in encoded([*PROMPTS, b""])]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "empty": ({"text": [b"x", b""]}, "text may not be empty"),
    "too long": ({"text": [b"x", b"\xc3\xa9" * 25]}, "the prompt is longer than the context of 48 tokens"),
    "far too long": ({"text": [b"x", b"x" * 1_000_000]}, "the prompt is longer than the context of 48 tokens"),
    "longer by what replaces its bytes": ({"text": [b"\xff" * 17, b"x"]}, "the longest one has] [51]"),
    "one text": ({"text": [b"x"]}, "max_new_tokens must have one value for each row of text"),
    "three seeds": ({"seed": [1, 2, 3]}, "seed must have one value for each row of text"),
    "no tokens": ({"max_new_tokens": [5, 0]}, "max_new_tokens must be at least 1"),
    "huge negative": ({"max_new_tokens": [5, -(2**31)]}, "max_new_tokens must be at least 1"),
    "temperature nan": ({"temperature": [np.nan, 0.0]}, "temperature must be a finite number, 0 or more"),
    "temperature below 0": ({"temperature": [0.0, -1.0]}, "temperature must be a finite number, 0 or more"),
    "top_k below 0": ({"top_k": [-1, 0]}, "top_k must be 0 (off) or more"),
    "top_p above 1": ({"top_p": [1.0, 1.5]}, "top_p must be above 0 and at most 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused_in_a_sentence(call: Call, case: str) -> None:
    changes, sentence = BAD[case]
    inputs = text_of([b"abc", b"de"]) | columns([{}, {}])
    inputs |= {key: np.array(value, inputs[key].dtype) for key, value in changes.items()}
    assert_refused(call, sentence, "generate_text", inputs)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"token_ids": [[1, 257]]}, "token_ids must be from 0 to 256"),
        ({"token_ids": [[-1, 1]]}, "token_ids must be from 0 to 256"),
        ({"lengths": [3]}, "lengths must be 0 to the width of token_ids"),
        ({"lengths": [-1]}, "lengths must be 0 to the width of token_ids"),
        ({"lengths": [1, 1]}, "lengths must have one value for each row of token_ids"),
    ],
)
def test_bad_tokens_are_refused_in_a_sentence(call: Call, changes: dict[str, Any], sentence: str) -> None:
    inputs = {"token_ids": [[1, 2]], "lengths": [2]} | changes
    assert_refused(call, sentence, "detokenize", {key: np.array(value, np.int32) for key, value in inputs.items()})


def test_an_empty_text_is_refused_by_the_end_token_of_the_tokenizer() -> None:
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str().replace("<|endoftext|>", "</s>"))
    geometry = keras_model("bytes").geometry
    text = TextSignatures(GraphTokenizer(tokenizer, geometry.vocab_size), geometry, lambda *_: pytest.fail("generated"))
    parameters = {name: tf.constant(value) for name, value in columns([{}]).items()}
    with pytest.raises(tf.errors.InvalidArgumentError, match="text may not be empty; </s> alone starts a new text"):
        text.generate(tf.constant([b""]), *(parameters[name] for name in PARAMETERS))


def test_the_most_tokens_that_can_be_asked_for(call: Call) -> None:
    (answer,) = by_graph(call, [b"abc"], [{"max_new_tokens": 2**31 - 1, "temperature": 1.0, "seed": 5}])
    assert answer[1] == LIMIT - 3 or answer[3] == "stop"


def test_a_tokenizer_that_no_graph_can_be_made_of_leaves_it_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    made = servable(keras_model("bytes"), tmp_path, ExportRecipe(slots=0), Reporter())
    assert made.text is None and made.slots is None
    assert "left generate_text out of the SavedModel: no graph code for its tokenizer (it has a normalizer" in (
        capsys.readouterr().out
    )
