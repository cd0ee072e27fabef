"""Bodies that are wrong in a million places at once: a quick 400, and no stream waits for it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from serving.server.request_bodies import MAX_VALUES
from tests.serving.attacked import Attacked, attacked

SIZE = 4 << 20
"""Bytes of a body, as many as the server takes."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    with attacked(tmp_path_factory.mktemp("wrong")) as server:
        yield server


INFER, GENERATE, PREDICT = "/v2/models/tiny/infer", "/v2/models/tiny/generate", "/v1/models/tiny:predict"
COMPLETIONS = "/v1/completions"
TENSOR = '{"inputs": [{"name": "%s", "datatype": "%s", "shape": [%s'
BODIES = {
    "inputs": (INFER, '{"inputs": [', "{}", "]}"),
    "outputs": (INFER, '{"inputs": [], "outputs": [', "0", "]}"),
    "shape": (INFER, TENSOR % ("a", "BYTES", ""), '""', "]}]}"),
    "data": (INFER, TENSOR % ("text_input", "BYTES", '1], "data": ['), "[]", "]}]}"),
    "nested": (INFER, TENSOR % ("token_ids", "INT32", '1], "data": ['), "[[0]]", "]}]}"),
    "numbers": (INFER, TENSOR % ("token_ids", "INT32", '1], "data": ['), "1", ', ""]}]}'),
    "text_input": (GENERATE, '{"text_input": [', "0", "]}"),
    "text_inputs": (GENERATE, '{"text_input": [', '""', "]}"),
    "extra": (GENERATE, '{"text_input": 1, ', '"%06x": 1', "}"),
    "detokenize": ("/detokenize", '{"tokens": [', '""', "]}"),
    "negative": ("/detokenize", '{"tokens": [', "-1", "]}"),
    "outside": ("/detokenize", '{"tokens": [', "1", ", 300]}"),
    "stop_token_ids": (COMPLETIONS, '{"stop_token_ids": [', "{}", "]}"),
    "stop": (COMPLETIONS, '{"stop": [', "0", "]}"),
    "bias": (COMPLETIONS, '{"logit_bias": {', '"%06x": "x"', "}}"),
    "biases": (COMPLETIONS, '{"logit_bias": {', '"1%06d": 1', "}}"),
    "prompts": (COMPLETIONS, '{"prompt": [', '""', "]}"),
    "prompt lists": (COMPLETIONS, '{"prompt": [', "[0]", "]}"),
    "prompt ids": (COMPLETIONS, '{"prompt": [', "0", ', ""]}'),
    "floats": (COMPLETIONS, '{"prompt": [', "0.5", "]}"),
    "not json": (COMPLETIONS, '{"prompt": [', "{}", ""),
    "deep": (COMPLETIONS, '{"prompt": ["a"', "[", ""),
    "columns": (PREDICT, '{"inputs": {"token_ids": [', "[1]", "]}}"),
    "rows": (PREDICT, '{"instances": [', "{}", "]}"),
    "instances": (PREDICT, '{"signature_name": "tokenize", "instances": [', '"a"', "]}"),
    "names": (PREDICT, '{"inputs": {', '"%06x": []', "}}"),
}


def filled(before: str, item: str, after: str, values: int) -> bytes:
    """A body of at most `SIZE` bytes and `values` values, filled up with items."""
    numbered = "%" in item
    length = len(item % 0) if numbered else len(item)
    each = 1 + sum(map(item.count, ",[{"))
    count = min((SIZE - len(before) - len(after)) // (length + 1), values // each)
    return (before + ",".join(item % index if numbered else item for index in range(count)) + after).encode()


@pytest.mark.parametrize(("path", "before", "item", "after"), BODIES.values(), ids=BODIES)
def test_a_wrong_body_is_refused_at_once_and_no_stream_waits(
    server: Attacked, path: str, before: str, item: str, after: str
) -> None:
    """As long as a body may be, and with as many values as it may have."""
    for values in (SIZE, MAX_VALUES - 10):
        body = filled(before, item, after, values)
        with server.watched() as pulse:
            before_it = server.processor()
            status, answer = server.post(path, body)
            seconds = server.processor() - before_it
        print(f"{len(body)} bytes: {seconds:.3f} s, the stream waited {pulse.worst:.3f} s")
        assert status == 400, answer[:300]
        assert len(answer) < 1000 and json.loads(answer)["error"]
        assert seconds < 1 and pulse.worst < 5, f"{seconds:.2f} s, the stream waited {pulse.worst:.2f} s"


def test_the_memory_of_wrong_bodies_is_given_back(server: Attacked) -> None:
    body = filled('{"inputs": [', "{}", "]}", SIZE)
    before = server.resident()
    for _ in range(5):
        assert server.post(INFER, body)[0] == 400
    assert server.resident() - before < 200 << 20
