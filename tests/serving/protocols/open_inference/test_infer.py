"""The Open Inference Protocol of our own server, by Triton's clients."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException

from serving.protobuf.open_inference import CONFIG_TYPES, MESSAGES
from serving.protocols.open_inference.signatures import SPECS
from serving.server.settings import Settings
from serving.server.state import Server
from tests.closed_form import byte_tokenizer, greedy
from tests.serving.double_engine import DoubleEngine, registry_of
from tests.serving.protocols.open_inference.double_server import serving_both

KEY = "correct-horse"
TEXT = "naïve ☃"
NAMES = {np.dtype(np.object_): "BYTES", np.dtype(np.int32): "INT32", np.dtype(np.int64): "INT64"}
NAMES |= {np.dtype(np.float32): "FP32", np.dtype(np.bool_): "BOOL"}
KINDS = [triton_http, triton_grpc]
# Triton's HTTP client closes itself again when it is collected, in whatever thread that is; gevent then complains.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def engine() -> Iterator[DoubleEngine]:
    engine = DoubleEngine(slots=8, queue=256)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def server(engine: DoubleEngine, tmp_path_factory: pytest.TempPathFactory) -> Server:
    server = Server(registry_of(engine, tmp_path_factory.mktemp("v2") / "tiny"))
    engine.observer = server.metrics.model("tiny", 1)
    return server


@pytest.fixture(scope="module")
def addresses(server: Server) -> Iterator[dict[Any, str]]:
    with serving_both(server) as (url, address):
        yield {triton_http: url.removeprefix("http://"), triton_grpc: address}


@pytest.fixture(params=KINDS, ids=["http", "grpc"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def client(kind: Any, addresses: dict[Any, str]) -> Iterator[Any]:
    with kind.InferenceServerClient(addresses[kind]) as client:
        yield client


def objects(*texts: str | bytes) -> Any:
    return np.array([text.encode() if isinstance(text, str) else text for text in texts], np.object_)


def tensors(kind: Any, arrays: dict[str, Any], **options: Any) -> list[Any]:
    made = []
    for name, array in arrays.items():
        tensor = kind.InferInput(name, list(array.shape), NAMES[array.dtype])
        tensor.set_data_from_numpy(array, **options)
        made.append(tensor)
    return made


def encoded(text: str) -> list[int]:
    ids: list[int] = byte_tokenizer().encode(text).ids
    return ids


def expected(text: str, count: int) -> list[int]:
    tokens = greedy(encoded(text), count, 257)
    return tokens[: tokens.index(256) + 1] if 256 in tokens else tokens


def test_the_server_and_its_model(client: Any, kind: Any) -> None:
    as_json = {} if kind is triton_http else {"as_json": True}
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    about = client.get_server_metadata(**as_json)
    assert about["name"] == "gpt2-bundle" and "binary_tensor_data" in about["extensions"]
    metadata = client.get_model_metadata("tiny", **as_json)
    assert (metadata["name"], metadata["versions"]) == ("tiny", ["1"])
    inputs, outputs = SPECS["generate"]
    for side, specs in (("inputs", inputs), ("outputs", outputs)):
        described = {each["name"]: (each["datatype"], list(map(int, each["shape"]))) for each in metadata[side]}
        assert described == {name: (spec.datatype, [-1] * spec.rank) for name, spec in specs.items()}
    config = client.get_model_config("tiny", **as_json)
    config = config.get("config", config)
    assert config["model_transaction_policy"]["decoupled"] is True
    first, *others = config["input"]
    assert first["data_type"] == "TYPE_STRING" and all(each["optional"] for each in others)
    index = client.get_model_repository_index(**as_json)
    (entry,) = index if kind is triton_http else index["models"]
    assert (entry["name"], entry["version"], entry["state"]) == ("tiny", "1", "READY")


@pytest.mark.parametrize("binary", [True, False])
def test_text_is_continued(client: Any, kind: Any, binary: bool) -> None:
    arrays = {"text_input": objects(TEXT, "b"), "max_tokens": np.array([6], np.int32)}
    options = {"binary_data": binary} if kind is triton_http else {}
    made = tensors(kind, arrays, **options)
    wanted = [kind.InferRequestedOutput(name, **options) for name in ("finish_reason", "text_output", "token_ids")]
    answer = client.infer("tiny", made, outputs=wanted, request_id="mine", parameters={"temperature": 0})
    response = answer.get_response() if kind is triton_http else answer.get_response(as_json=True)
    assert response["id"] == "mine" and response["model_version"] == "1"
    assert [each["name"] for each in response["outputs"]] == ["finish_reason", "text_output", "token_ids"]
    for row, text in enumerate((TEXT, "b")):
        tokens = expected(text, 6)
        assert answer.as_numpy("token_ids")[row].tolist() == tokens + [256] * (6 - len(tokens))
        got = answer.as_numpy("text_output")[row]
        made_text = byte_tokenizer().decode(tokens)
        assert (got.decode() if isinstance(got, bytes) else got) == made_text


def test_other_signatures_have_their_tensors(client: Any, kind: Any) -> None:
    tokens = client.infer("tiny", tensors(kind, {"text": objects(TEXT)}), parameters={"signature_name": "tokenize"})
    ids, lengths = tokens.as_numpy("token_ids"), tokens.as_numpy("lengths")
    assert ids.tolist() == [encoded(TEXT)] and lengths.tolist() == [len(TEXT.encode())]
    rows = {"token_ids": ids, "lengths": lengths}
    text = client.infer("tiny", tensors(kind, rows), parameters={"signature_name": "detokenize"})
    assert text.as_numpy("text").tolist() == [TEXT.encode()]
    parameters = {"signature_name": "serving_default", "max_new_tokens": 6, "temperature": 0, "top_k": 0, "top_p": 1}
    made = client.infer("tiny", tensors(kind, rows), parameters={**parameters, "seed": 0})
    assert made.as_numpy("token_ids")[0, : made.as_numpy("lengths")[0]].tolist() == expected(TEXT, 6)
    scores = client.infer("tiny", tensors(kind, rows), parameters={"signature_name": "score"})
    assert scores.as_numpy("log_probs").shape == ids.shape and scores.as_numpy("total").dtype == np.float32


@pytest.mark.parametrize(
    ("arrays", "parameters", "words"),
    [
        ({"text_input": objects("a"), "nonsense": np.zeros(1, np.int32)}, {}, "no input 'nonsense'"),
        ({"max_tokens": np.ones(1, np.int32)}, {}, "text_input is missing"),
        ({"text_input": objects("a"), "max_tokens": np.full(1, 2**40, np.int64)}, {}, "must be INT32, and has INT64"),
        ({"text_input": objects("a"), "max_tokens": np.ones((1, 2), np.int32)}, {}, "1 axes, and 2"),
        ({"text_input": objects("a"), "top_k": np.ones(3, np.int32)}, {}, "one for each text"),
        ({"text_input": objects("a")}, {"temperature": -1}, "temperature: "),
        ({"text_input": objects("a")}, {"max_tokens": 0}, "at least 1"),
        ({"text_input": objects("a")}, {"max_tokens": 5000}, "do not fit"),
        ({"text_input": objects("a")}, {"signature_name": "prefill"}, "no signature 'prefill'"),
        ({"text_input": objects(*["a"] * 1025)}, {}, "1 to 1024"),
        ({"text": objects("a")}, {"signature_name": "generate_text"}, "max_new_tokens is missing"),
        ({"text_input": objects("a")}, {"stream": "yes"}, "true or false"),
    ],
)
def test_what_is_wrong_is_said(client: Any, kind: Any, arrays: Any, parameters: Any, words: str) -> None:
    with pytest.raises(InferenceServerException, match=words) as caught:
        client.infer("tiny", tensors(kind, arrays), parameters=parameters)
    assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")


@pytest.mark.parametrize(("name", "version", "words"), [("nobody", "", "'nobody'"), ("tiny", "7", "no version 7")])
def test_who_is_not_there(client: Any, kind: Any, name: str, version: str, words: str) -> None:
    for ask in (
        lambda: client.infer(name, tensors(kind, {"text_input": objects("a")}), version),
        lambda: client.get_model_metadata(name, version),
        lambda: client.get_inference_statistics(name, version),
    ):
        with pytest.raises(InferenceServerException, match=words) as caught:
            ask()
        assert caught.value.status() in ("404", "StatusCode.NOT_FOUND")


def test_statistics_count_requests(client: Any, kind: Any) -> None:
    def counted() -> Any:
        answer = client.get_inference_statistics("tiny", **({} if kind is triton_http else {"as_json": True}))
        (model,) = answer["model_stats"]
        return int(model.get("inference_count", 0)), int(model["inference_stats"]["success"].get("count", 0))

    before = counted()
    client.infer("tiny", tensors(kind, {"text_input": objects("a", "b")}))
    deadline = time.monotonic() + 5
    while counted() != (before[0] + 2, before[1] + 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert counted() == (before[0] + 2, before[1] + 2)


def test_text_streams_in_pieces(addresses: dict[Any, str]) -> None:
    came: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with triton_grpc.InferenceServerClient(addresses[triton_grpc]) as client:
        client.start_stream(lambda result, error: came.put((result, error)))
        greedily = {"temperature": 0, "max_tokens": 20}
        client.async_stream_infer(
            "tiny", tensors(triton_grpc, {"text_input": objects(TEXT)}), request_id="one", parameters=greedily
        )
        client.async_stream_infer(
            "tiny",
            tensors(triton_grpc, {"text_input": objects("b")}),
            request_id="two",
            parameters=greedily,
            enable_empty_final_response=True,
        )
        client.async_stream_infer("tiny", tensors(triton_grpc, {"text_input": objects("c", "d")}), request_id="wrong")
        client.async_stream_infer(
            "tiny",
            tensors(triton_grpc, {"text_input": objects("c", "d"), "stream": np.array([False])}),
            request_id="whole",
        )
        client.async_stream_infer(
            "tiny",
            tensors(triton_grpc, {"text": objects("c")}),
            parameters={"signature_name": "tokenize"},
        )
        texts: dict[str, list[str]] = {}
        ids: dict[str, list[int]] = {}
        left, errors = {"one", "two", "whole", ""}, []
        while left or not errors:
            result, error = came.get(timeout=10)
            if error is not None:
                errors.append(error)
                continue
            response = result.get_response()
            if response.parameters["triton_final_response"].bool_param:
                left.remove(response.id)
            if response.id in ("one", "two"):
                (text,) = result.as_numpy("text_output").tolist()
                texts.setdefault(response.id, []).append(text.decode())
                ids.setdefault(response.id, []).extend(result.as_numpy("token_ids")[0].tolist())
        client.stop_stream()
    assert [str(error) for error in errors] == ["a stream takes one text, and text_input has 2"]
    for name, prompt in (("one", TEXT), ("two", "b")):
        assert ids[name] == expected(prompt, 20)
        assert "".join(texts[name]) == byte_tokenizer().decode(expected(prompt, 20))


def long_prompt() -> str:
    return next(chr(at) for at in range(33, 127) if 256 not in greedy(encoded(chr(at)), 400, 257))


def wait_until_free(engine: DoubleEngine) -> None:
    deadline = time.monotonic() + 5
    while engine.stats().active_slots and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.stats().active_slots == 0


def test_a_cancelled_stream_and_a_deadline_free_the_slot(
    addresses: dict[Any, str], engine: DoubleEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.pace = 0.02
    try:
        request = {"text_input": objects(long_prompt())}
        came: queue.Queue[Any] = queue.Queue()
        with triton_grpc.InferenceServerClient(addresses[triton_grpc]) as client:
            made = tensors(triton_grpc, request)
            client.start_stream(lambda result, error: came.put(error))
            client.async_stream_infer("tiny", made, parameters={"max_tokens": 400, "ignore_eos": True})
            assert came.get(timeout=5) is None and engine.stats().active_slots == 1
            client.stop_stream(cancel_requests=True)
            wait_until_free(engine)
            with pytest.raises(InferenceServerException) as caught:
                client.infer("tiny", made, parameters={"max_tokens": 400}, client_timeout=0.3)
            assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
            wait_until_free(engine)
            with pytest.raises(InferenceServerException) as caught:
                client.infer("tiny", made, parameters={"max_tokens": 400}, timeout=100_000)
            assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
        assert not [record for record in caplog.records if record.levelname == "ERROR"]
    finally:
        engine.pace = 0.0


def test_a_stream_that_is_left_open_does_not_hold_up_a_drain(server: Server, engine: DoubleEngine) -> None:
    own = Server(server.registry)
    came: queue.Queue[Any] = queue.Queue()
    engine.pace = 0.01
    try:
        with serving_both(own) as (_, address), triton_grpc.InferenceServerClient(address) as client:
            client.start_stream(lambda result, error: came.put((result, error)))
            made = tensors(triton_grpc, {"text_input": objects(long_prompt())})
            client.async_stream_infer("tiny", made, parameters={"max_tokens": 80, "ignore_eos": True})
            result, error = came.get(timeout=5)
            own.draining = True
            while error is None:
                final = result.get_response().parameters["triton_final_response"].bool_param
                result, error = came.get(timeout=5)
            assert final and error.status() == "StatusCode.UNAVAILABLE"
    finally:
        engine.pace = 0.0


def test_each_request_of_a_stream_counts_for_the_rate_limit(server: Server) -> None:
    limited = Server(server.registry, Settings(rate_limit=2))
    came: queue.Queue[Any] = queue.Queue()
    with serving_both(limited) as (_, address), triton_grpc.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: came.put(error))
        for _ in range(3):
            made = tensors(triton_grpc, {"text_input": objects("a")})
            client.async_stream_infer("tiny", made, parameters={"stream": False})
        errors = [came.get(timeout=5) for _ in range(3)]
        client.stop_stream()
    (refused,) = [error for error in errors if error is not None]
    assert "too many requests" in str(refused)


def test_keys(server: Server, kind: Any) -> None:
    closed = Server(server.registry, Settings(api_keys=(KEY,)))
    with serving_both(closed) as (url, address):
        at = url.removeprefix("http://") if kind is triton_http else address
        headers = {"authorization": f"Bearer {KEY}"}
        with kind.InferenceServerClient(at) as client:
            assert client.is_server_live() and client.is_server_ready()
            for ask in (
                lambda: client.get_server_metadata(),
                lambda: client.infer("tiny", tensors(kind, {"text_input": objects("a")})),
            ):
                with pytest.raises(InferenceServerException, match="needs an API key") as caught:
                    ask()
                assert caught.value.status() in ("401", "StatusCode.UNAUTHENTICATED")
            made = tensors(kind, {"text_input": objects("a")})
            assert client.infer("tiny", made, headers=headers).as_numpy("lengths").shape == (1,)


def test_messages_have_the_official_names_and_numbers() -> None:
    seen = set()

    def compare(ours: Any, theirs: Any) -> None:
        seen.add(ours.name)
        for field in ours.fields:
            other = theirs.fields_by_name[field.name]
            # Enumerations are their numbers here.
            kinds = (other.number, 5 if other.type == 14 else other.type, other.is_repeated)
            assert (field.number, field.type, field.is_repeated) == kinds, field.full_name
            assert (field.containing_oneof is None) == (other.containing_oneof is None), field.full_name
            if field.message_type is not None:
                compare(field.message_type, other.message_type)

    official = service_pb2.DESCRIPTOR.message_types_by_name
    for name, message in MESSAGES.items():
        if name in official:
            compare(message.DESCRIPTOR, official[name])
    assert set(MESSAGES) <= seen
    numbers = model_config_pb2.DataType.items()
    assert {f"TYPE_{'STRING' if name == 'BYTES' else name}": at for name, at in CONFIG_TYPES.items()}.items() <= dict(
        numbers
    ).items()
