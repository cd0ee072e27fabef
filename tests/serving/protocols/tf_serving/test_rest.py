"""TensorFlow Serving's REST API of our own server, by our own client and by hand."""

from __future__ import annotations

import base64
import gzip
import json
import random
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest

from serving.clients.rest_transport import RestTransport
from serving.clients.tf_serving import TFServingClient
from serving.entrypoints.http_app import build_app
from serving.errors import ServerError
from serving.generation import generate
from serving.protocols.tf_serving import rest as tf_rest
from serving.protocols.tf_serving.signatures import SIGNATURES
from serving.sampling import SamplingParams
from serving.server.settings import Settings
from tests.closed_form import ClosedFormBackend
from tests.serving.double_engine import DoubleEngine, registry_of
from tests.serving.live_server import running

PARAMETERS: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
FEW = SamplingParams(max_new_tokens=6)
PROMPTS = [[7, 8, 9], [1], [200, 3]]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    engine = DoubleEngine(slots=8, queue=256)
    registry = registry_of(engine, tmp_path_factory.mktemp("rest") / "tiny")
    settings = Settings()
    with running(build_app(registry, settings, tf_rest.routes(registry, settings))) as address:
        yield address
    engine.close()


def client(url: str, layout: Any) -> TFServingClient:
    return TFServingClient(RestTransport(url, "tiny", layout))


def batch(prompts: list[list[int]], **changes: Any) -> dict[str, Any]:
    width = max(map(len, prompts))
    rows = len(prompts)
    columns = {"token_ids": [row + [256] * (width - len(row)) for row in prompts], "lengths": list(map(len, prompts))}
    return columns | {name: [value] * rows for name, value in (PARAMETERS | changes).items()}


def post(url: str, body: Any, path: str = "/v1/models/tiny:predict") -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize("layout", ["row", "column"])
def test_tokens_are_those_of_generate(url: str, layout: str) -> None:
    got = client(url, layout).predict(batch(PROMPTS))
    made = generate(ClosedFormBackend(257, 1024), PROMPTS, FEW, 256)
    assert got["lengths"].tolist() == [len(row.token_ids) for row in made]
    for row, length, wanted in zip(got["token_ids"], got["lengths"], made, strict=True):
        assert row[:length].tolist() == list(wanted.token_ids)
        assert set(row[length:].tolist()) <= {256}


@pytest.mark.parametrize("layout", ["row", "column"])
def test_text(url: str, layout: str) -> None:
    (made,) = client(url, layout).generate(["naïve ☃"], SamplingParams(max_new_tokens=5))
    assert 1 <= made.tokens <= 5 and made.finish_reason in ("stop", "length")
    texts = np.array(["naïve ☃".encode(), b"\xff"], np.object_)
    tokens = client(url, layout).predict({"text": texts}, "tokenize")
    assert tokens["lengths"].tolist() == [10, 3]
    assert client(url, layout).predict(tokens, "detokenize")["text"].tolist() == ["naïve ☃", "\ufffd"]


@pytest.mark.parametrize("layout", ["row", "column"])
def test_score(url: str, layout: str) -> None:
    from tests.closed_form import logits_after

    prompt = {"token_ids": np.array([[7, 8, 9], [1, 256, 256]], np.int32), "lengths": np.array([3, 1], np.int32)}
    got = client(url, layout).predict(prompt, "score")
    wanted = [[0.0, logits_after([7], 257)[8], logits_after([7, 8], 257)[9]], [0.0, 0.0, 0.0]]
    assert np.allclose(got["log_probs"], wanted)
    assert np.allclose(got["total"], np.sum(wanted, axis=1))


def test_score_takes_a_row_that_fills_the_context(url: str) -> None:
    from tests.closed_form import logits_after

    row = [place % 250 for place in range(1024)]
    prompt = {"token_ids": np.array([row], np.int32), "lengths": np.array([1024], np.int32)}
    got = client(url, "column").predict(prompt, "score")["log_probs"][0]
    assert got.shape == (1024,) and got[0] == 0
    assert got[-1] == pytest.approx(float(logits_after(row[:-1], 257)[row[-1]]))


def test_a_prompt_that_fills_the_context_gets_nothing(url: str) -> None:
    got = client(url, "column").predict(batch([[5] * 1024, [5]]))
    assert got["lengths"].tolist() == [0, len(generate(ClosedFormBackend(257, 1024), [[5]], FEW, 256)[0].token_ids)]


def test_metadata_and_versions(url: str) -> None:
    signatures = client(url, "row").metadata()
    assert set(signatures) == set(SIGNATURES)
    assert signatures["score"]["inputs"]["token_ids"] == {"dtype": "DT_INT32", "shape": [-1, -1]}
    for number in (0, 1):  # 0 is the newest to OpenVINO's clients.
        with urllib.request.urlopen(f"{url}/v1/models/tiny/versions/{number}") as response:
            (version,) = json.load(response)["model_version_status"]
    assert (version["version"], version["state"], version["status"]["error_code"]) == ("1", "AVAILABLE", "OK")
    for path, code, words in [
        ("/v1/models/nobody:predict", 404, "nobody"),
        ("/v1/models/tiny/versions/9:predict", 404, "version 9"),
        ("/v1/models/tiny/versions/x:predict", 400, "whole number"),
        ("/v1/models/tiny/labels/stable:predict", 400, "label: stable"),
    ]:
        status, answer = post(url, {"inputs": batch([[1]])}, path)
        assert status == code and words in answer["error"]
    assert post(url, {"inputs": batch([[1]])}, "/v1/models/tiny/versions/1:predict")[0] == 200
    with pytest.raises(urllib.error.HTTPError, match="400") as refused:
        urllib.request.urlopen(f"{url}/v1/models/tiny/labels/stable")
    assert "label: stable" in json.load(refused.value)["error"]


def test_b64_and_bare_values(url: str) -> None:
    text = {"b64": base64.b64encode("é".encode()).decode()}
    for body in ({"inputs": [text]}, {"inputs": {"text": [text]}}, {"instances": [text]}, {"instances": ["é"]}):
        status, answer = post(url, {"signature_name": "tokenize", **body})
        (made,) = answer["predictions"] if "instances" in body else [answer["outputs"]]
        assert status == 200 and made["lengths"] in (2, [2])


def texts(text: str) -> dict[str, Any]:
    inputs = {"text": [text], **{name: [value] for name, value in PARAMETERS.items()}}
    return {"signature_name": "generate_text", "inputs": inputs}


WRONG: list[tuple[Any, str]] = [
    (b"{", "not JSON"),
    (b"[" * 100_000, "nested|not JSON"),
    (b"[]", "object"),
    ({}, "either"),
    ({"inputs": batch([[1]]), "instances": []}, "either"),
    ({"instances": []}, "at least one row"),
    ({"signature_name": "prefill", "inputs": {}}, '"prefill" not found'),
    ({"signature_name": 3, "inputs": {}}, "must be text"),
    ({"inputs": {"token_ids": [[1]]}}, "missing: lengths"),
    ({"inputs": batch([[1]]) | {"x": [1]}}, "unknown: x"),
    ({"inputs": batch([[1]]) | {"lengths": [0]}}, "may not be empty"),
    ({"inputs": batch([[1]]) | {"lengths": [-3]}}, "may not be empty"),
    ({"inputs": batch([[1]]) | {"lengths": [2]}}, "pass the end"),
    ({"inputs": batch([[1]]) | {"lengths": [1, 1]}}, "one value for each row"),
    ({"inputs": batch([[1] * 1025])}, "longer than the context"),
    ({"inputs": batch([[257]])}, "from 0 to 256"),
    ({"inputs": batch([[-1]])}, "from 0 to 256"),
    ({"inputs": batch([[2**31]])}, "integers of int32"),
    ({"inputs": batch([[1.5]])}, "integers of int32"),
    ({"inputs": batch([[True]])}, "must hold numbers"),
    ({"inputs": batch([["a"]])}, "must hold numbers"),
    ({"inputs": batch([[1]]) | {"token_ids": [[1], [2, 3]]}}, "pad them"),
    ({"inputs": batch([[1]]) | {"token_ids": [1]}}, "list of lists"),
    ({"inputs": batch([[1]]) | {"token_ids": 1}}, "a list with a value for each row"),
    ({"inputs": batch([[1]]) | {"token_ids": []}}, "each row|0 rows"),
    ({"inputs": batch([[1]], temperature=float("nan"))}, "finite number"),
    ({"inputs": batch([[1]], temperature=-1)}, "finite number"),
    ({"inputs": batch([[1]], temperature=10**400)}, "finite number"),
    ({"inputs": batch([[1]], max_new_tokens=0)}, "at least 1"),
    ({"inputs": batch([[1]], max_new_tokens=2**31)}, "integers of int32"),
    ({"inputs": batch([[1]], top_k=-1)}, "top_k"),
    ({"inputs": batch([[1]], top_p=0)}, "top_p"),
    ({"inputs": batch([[1]], seed=-2)}, "seed"),
    ({"inputs": batch([[1]] * 1025)}, "1 to 1024"),
    ({"instances": [{"token_ids": [1]}, {"lengths": 1}]}, "names of row 0"),
    (texts(""), "empty"),
    (
        {
            "signature_name": "generate_text",
            "inputs": {"text": ["a" * 1025], **{k: [v] for k, v in PARAMETERS.items()}},
        },
        "longer than the context",
    ),
    ({"signature_name": "tokenize", "inputs": [{"b64": "?"}]}, "base64"),
    ({"signature_name": "tokenize", "inputs": [3]}, "text or"),
    ({"signature_name": "detokenize", "inputs": {"token_ids": [[1]], "lengths": [2]}}, "0 to the width"),
    ({"signature_name": "detokenize", "inputs": {"token_ids": [[999]], "lengths": [1]}}, "from 0 to 256"),
]


@pytest.mark.parametrize(("body", "words"), WRONG)
def test_what_is_wrong_gets_400_and_a_sentence(url: str, body: Any, words: str) -> None:
    status, answer = post(url, body)
    assert status == 400, answer
    assert any(word in answer["error"] for word in words.split("|")) and "\n" not in answer["error"], answer


def test_a_huge_count_ends_with_the_context(url: str) -> None:
    status, answer = post(url, {"inputs": batch([[1] * 1020], max_new_tokens=2**31 - 1)})
    assert status == 200 and answer["outputs"]["lengths"] == [4]


def test_mutated_bodies_cause_no_internal_error(url: str) -> None:
    generator = random.Random(1)
    seeds = [json.dumps({"inputs": batch(PROMPTS)}).encode(), json.dumps(WRONG[-2][0]).encode()]
    for _ in range(300):
        data = bytearray(generator.choice(seeds))
        for _ in range(generator.randint(1, 4)):
            at = generator.randrange(len(data))
            data[at : at + generator.randint(0, 3)] = generator.choice(
                [b"", b"-", b"9999999999", b"null", b"[", b"]", b"{}", b'"', b"\xff", b"1e400", b"true"]
            )
        status, answer = post(url, bytes(data))
        assert status in (200, 400), (bytes(data), answer)


def test_packed_bodies_are_unpacked(url: str) -> None:
    body = gzip.compress(json.dumps({"signature_name": "tokenize", "instances": ["Ab"]}).encode())
    for encoding, status in (("gzip", 200), ("zstd", 415)):
        answer = httpx.post(
            f"{url}/v1/models/tiny:predict", content=body, headers={"Content-Encoding": encoding, "X-Request-Id": "r"}
        )
        assert answer.status_code == status, answer.text
        assert "'zstd'" in answer.text if status == 415 else answer.json()["predictions"][0]["lengths"] == 2


@pytest.mark.parametrize("method", ["classify", "regress"])
def test_methods_that_are_not_offered_say_so(url: str, method: str) -> None:
    for path in (f"/v1/models/tiny:{method}", f"/v1/models/tiny/versions/1:{method}"):
        status, answer = post(url, {"examples": [{}]}, path)
        assert status == 501 and f"{method} is not offered" in answer["error"]


def test_a_refused_row_leaves_nothing_running(url: str) -> None:
    with pytest.raises(ServerError, match="may not be empty"):
        client(url, "row").predict(batch(PROMPTS) | {"lengths": [3, 1, 0]})


def test_the_time_limit_is_a_requests_own(url: str) -> None:
    body = {"inputs": batch([[7, 8]])}
    request = urllib.request.Request(url + "/v1/models/tiny:predict", json.dumps(body).encode())
    request.add_header("X-Request-Timeout", "soon")
    with pytest.raises(urllib.error.HTTPError, match="400") as caught:
        urllib.request.urlopen(request)
    assert "write seconds above 0" in json.load(caught.value)["error"]
