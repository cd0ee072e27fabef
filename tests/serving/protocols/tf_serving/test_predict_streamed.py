"""PredictStreamed of our own server, by the official messages and by the client: increments that make up the answer."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2

from serving.cli import run
from serving.clients.grpc_transport import GrpcTransport
from serving.clients.rest_transport import RestTransport
from serving.clients.tf_serving import TFServingClient
from serving.errors import InputError, ServerError
from serving.sampling import SamplingParams
from tests.closed_form import byte_tokenizer, greedy
from tests.serving.double_engine import DoubleEngine
from tests.serving.protocols.tf_serving.test_grpc import KEY, addresses, arrays, engine
from tests.serving.protocols.tf_serving.test_rest import PROMPTS, batch

__all__ = ["addresses", "engine"]
METHOD = "/tensorflow.serving.PredictionService/PredictStreamed"
ENDLESS = next([token] for token in range(256) if 256 not in greedy([token], 100, 257))
PARAMS = SamplingParams(max_new_tokens=6)


@pytest.fixture(autouse=True)
def slowly(engine: DoubleEngine) -> Iterator[None]:
    engine.pace = 0.005
    yield
    engine.pace = 0.0
    deadline = time.monotonic() + 5
    while engine.stats().active_slots and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.stats().active_slots == 0


def request(columns: dict[str, Any] | None = None, signature: str = "", **options: Any) -> Any:
    message = predict_pb2.PredictRequest()
    message.model_spec.name, message.model_spec.signature_name = "tiny", signature
    for name, value in (columns or {}).items():
        message.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    for name, value in options.items():
        setattr(message.predict_streamed_options, name, value)
    return message


def ask(address: str, *requests: Any, metadata: Any = None) -> list[dict[str, Any]]:
    with grpc.insecure_channel(address) as channel:
        method = channel.stream_stream(
            METHOD, predict_pb2.PredictRequest.SerializeToString, predict_pb2.PredictResponse.FromString
        )
        return [
            {name: tf.make_ndarray(tensor) for name, tensor in response.outputs.items()}
            for response in method(iter(requests), metadata=metadata, timeout=20)
        ]


def rows_of(increments: list[dict[str, Any]], count: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(count)]
    for each in increments:
        for row, tokens, length in zip(rows, each["token_ids"], each["lengths"], strict=True):
            row += tokens[:length].tolist()
    return rows


def test_increments_make_up_the_answer(addresses: tuple[str, str]) -> None:
    transport = GrpcTransport(addresses[0], "tiny")
    full = [*PROMPTS, [3] * 1024, ENDLESS]
    columns = arrays(batch(full, max_new_tokens=9))
    whole = transport.predict("serving_default", columns, 20.0)
    increments = ask(addresses[0], request(columns))
    assert len(increments) > 3
    wanted = [row[:length].tolist() for row, length in zip(whole["token_ids"], whole["lengths"], strict=True)]
    assert rows_of(increments, len(full)) == wanted and wanted[3] == []

    given = {"text": np.array(["naïve ☃".encode(), b"ab"], np.object_)}
    parameters = {name: value[:2] for name, value in columns.items() if name not in ("token_ids", "lengths")}
    whole = transport.predict("generate_text", given | parameters, 20.0)
    increments = ask(addresses[0], request(given | parameters, "generate_text"))
    assert len(increments) > 3
    for row in range(2):
        assert b"".join(each["text"][row] for each in increments) == whole["text"][row]
        assert sum(each["lengths"][row] for each in increments) == whole["lengths"][row]
        assert [each["finish_reason"][row] for each in increments if each["finish_reason"][row]] == [
            whole["finish_reason"][row]
        ]
        assert {each["prompt_tokens"][row] for each in increments} == {whole["prompt_tokens"][row]}


def test_what_does_not_stream_is_one_answer(addresses: tuple[str, str]) -> None:
    columns = arrays(batch(PROMPTS))
    (one,) = ask(addresses[0], request(columns, return_single_response=True))
    assert rows_of([one], 3) == rows_of(ask(addresses[0], request(columns, request_state=2)), 3)
    (tokens,) = ask(addresses[0], request({"text": np.array([b"ab"], np.object_)}, "tokenize"))
    assert tokens["lengths"].tolist() == [2]
    (one,) = ask(addresses[0], request(arrays(batch([[3] * 1024]))))
    assert one["lengths"].tolist() == [0]
    filtered = request(columns)
    filtered.output_filter.append("lengths")
    assert {name for each in ask(addresses[0], filtered) for name in each} == {"lengths"}
    # An announcement, as newer clients send it, has neither signature nor inputs.
    assert ask(addresses[0], request(), request(columns))


def test_what_is_refused(addresses: tuple[str, str]) -> None:
    columns = arrays(batch(PROMPTS))
    for requests, code, words in (
        ([], "INVALID_ARGUMENT", "needs a request with inputs"),
        ([request(columns, request_state=1)], "UNIMPLEMENTED", "SPLIT"),
        ([request(columns | {"lengths": np.array([0, 1, 1], np.int32)})], "INVALID_ARGUMENT", "may not be empty"),
        ([request(columns, "nothing")], "INVALID_ARGUMENT", "not found"),
        ([request(arrays(batch([ENDLESS], max_new_tokens=500)))] * 2, "INVALID_ARGUMENT", "takes one request"),
    ):
        with pytest.raises(grpc.RpcError, match=words) as caught:
            ask(addresses[0], *requests)
        assert caught.value.code().name == code  # type: ignore[attr-defined]
    with pytest.raises(grpc.RpcError, match="needs an API key"):
        ask(addresses[1], request(columns))
    assert ask(addresses[1], request(columns), metadata=[("authorization", f"Bearer {KEY}")])


def test_a_cancel_by_message_ends_the_stream_without_an_error(addresses: tuple[str, str]) -> None:
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    requests.put(request(arrays(batch([ENDLESS], max_new_tokens=1000))))
    with grpc.insecure_channel(addresses[0]) as channel:
        method = channel.stream_stream(METHOD, predict_pb2.PredictRequest.SerializeToString)
        answers = method(iter(requests.get, None), timeout=20)
        next(answers)
        requests.put(request(request_state=3))
        count = sum(1 for _ in answers)
        requests.put(None)
    assert count < 900


@pytest.mark.parametrize("here", [True, False])
def test_the_client_streams(addresses: tuple[str, str], engine: DoubleEngine, here: bool) -> None:
    client = TFServingClient(GrpcTransport(addresses[0], "tiny"), timeout=20)
    tokenizer = byte_tokenizer() if here else None
    texts = ["naïve ☃", "ab", "x"]
    wanted = client.generate(texts, PARAMS)
    pieces = list(client.predict_stream(texts, PARAMS, tokenizer))
    assert len(pieces) > 6
    for index, each in enumerate(wanted):
        mine = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in mine) == each.text and mine[-1].finish_reason == each.finish_reason
        assert not here or sum(len(piece.token_ids) for piece in mine) == each.tokens
    stop = wanted[1].text[2:4]
    cut = "".join(
        piece.text for piece in client.predict_stream("ab", SamplingParams(max_new_tokens=500, stop=(stop,)), tokenizer)
    )
    assert cut == wanted[1].text[: wanted[1].text.index(stop)]
    with contextlib.closing(
        client.predict_stream([bytes(ENDLESS).decode("latin-1")], SamplingParams(max_new_tokens=1000), tokenizer)
    ) as stream:  # type: ignore[type-var]
        next(stream)
    # The fixture sees that the slot is free.
    with pytest.raises(InputError, match="ignore_eos needs slots"):
        client.predict_stream(texts, SamplingParams(ignore_eos=True))
    with pytest.raises(InputError, match="may not be empty"):
        client.predict_stream([""], PARAMS)
    with pytest.raises(ServerError, match="a call of gRPC alone"):
        list(TFServingClient(RestTransport("http://127.0.0.1:1", "tiny")).predict_stream("a", PARAMS))


def test_the_command_streams(addresses: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    (wanted,) = TFServingClient(GrpcTransport(addresses[0], "tiny")).generate(["ab"], PARAMS)
    command = ["client", "generate", "ab", "--grpc", addresses[0], "--model", "tiny", "--max-new-tokens", "6"]
    assert run([*command, "--stream"]) == 0
    assert capsys.readouterr().out == f"{wanted.text}\n"
    assert run([*command, "--stop", wanted.text[2:4]]) == 0
    assert capsys.readouterr().out == wanted.text[: wanted.text.index(wanted.text[2:4])] + "\n"
