"""Bodies and messages that fit nothing end in a refusal, never in an internal error."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import grpc
import httpx2 as httpx
import pytest
from tritonclient.grpc import service_pb2

from serving.protobuf.open_inference import INFERENCE_SERVICE
from serving.protocols.open_inference.http import HEADER_LENGTH
from serving.server.state import Server
from tests.serving.double_engine import DoubleEngine, registry_of
from tests.serving.protocols.open_inference.double_server import serving_both

ROUNDS = 400
PIECES = [b"", b"-", b"9999999999", b"null", b"[", b"]", b"{}", b'"', b"\xff", b"1e400", b"true", b"\0", b"NaN", b"[]"]


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    engine = DoubleEngine(slots=8, queue=256)
    with serving_both(Server(registry_of(engine, tmp_path_factory.mktemp("v2") / "tiny"))) as both:
        yield both
    engine.close()


def mutated(source: random.Random, data: bytes) -> bytes:
    made = bytearray(data)
    for _ in range(source.randint(1, 4)):
        at = source.randrange(len(made) + 1)
        made[at : at + source.randint(0, 3)] = source.choice(PIECES)
    return bytes(made)


def seeds() -> list[tuple[str, bytes, bytes]]:
    """(path, JSON, what is behind it)."""
    text = {"name": "text_input", "datatype": "BYTES", "shape": [2], "data": ["ab", "c"]}
    count = {"name": "max_tokens", "datatype": "INT32", "shape": [1], "data": [3]}
    ids = {"name": "token_ids", "datatype": "INT32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}
    lengths = {"name": "lengths", "datatype": "INT32", "shape": [1], "data": [[2]]}
    packed = {"name": "text_input", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 6}}
    stop = {"name": "stop", "datatype": "BYTES", "shape": [1], "data": ["x"]}
    infer: list[tuple[Any, bytes]] = [
        ({"id": "a", "inputs": [text, count], "outputs": [{"name": "text_output"}]}, b""),
        ({"inputs": [ids, lengths], "parameters": {"signature_name": "score"}}, b"\5\0\0\0\6\0\0\0"),
        ({"inputs": [packed, stop], "parameters": {"binary_data_output": True, "top_p": 0.5}}, b"\2\0\0\0ab"),
    ]
    made = [("infer", json.dumps(body).encode(), blob) for body, blob in infer]
    asked = json.dumps({"text_input": "ab", "parameters": {"max_tokens": 3, "temperature": 0.5}, "stop": ["x"]})
    return [*made, ("generate", asked.encode(), b""), ("generate_stream", asked.encode(), b"")]


def test_mutated_bodies(addresses: tuple[str, str], caplog: pytest.LogCaptureFixture) -> None:
    source = random.Random(5)
    seen: dict[int, int] = {}
    with httpx.Client(base_url=addresses[0]) as client:
        for _ in range(ROUNDS):
            path, text, blob = source.choice(seeds())
            text = mutated(source, text) if source.random() < 0.8 else text
            size = str(len(text))
            if blob and source.random() < 0.5:
                blob = mutated(source, blob)
            if source.random() < 0.1:
                size = source.choice(["0", "1", "x", "99999999999999", str(len(text) + 3), ""])
            headers = {HEADER_LENGTH: size} if path == "infer" else {}
            answer = client.post(f"/v2/models/tiny/{path}", content=text + blob, headers=headers)
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            assert answer.status_code in (200, 400), (path, text, blob, answer.text)
            assert answer.status_code == 200 or "\n" not in answer.json()["error"]
            assert "internal error" not in answer.text
    assert seen[400] > ROUNDS / 4 and seen[200] > ROUNDS / 20, seen
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


def requests() -> list[Any]:
    typed = service_pb2.ModelInferRequest(model_name="tiny", id="a")
    typed.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"ab")
    typed.inputs.add(name="max_tokens", datatype="INT32", shape=[1]).contents.int_contents.append(3)
    typed.inputs.add(name="temperature", datatype="FP32", shape=[1]).contents.fp32_contents.append(0.5)
    raw = service_pb2.ModelInferRequest(model_name="tiny", model_version="1")
    raw.parameters["signature_name"].string_param = "score"
    raw.inputs.add(name="token_ids", datatype="INT32", shape=[1, 2])
    raw.inputs.add(name="lengths", datatype="INT32", shape=[1])
    raw.raw_input_contents.extend([b"\5\0\0\0\6\0\0\0", b"\2\0\0\0"])
    raw.outputs.add(name="total")
    return [typed, raw]


def edited(source: random.Random, request: Any) -> bytes:
    """`request` with one field changed, or some of its bytes."""
    made = type(request)()
    made.CopyFrom(request)
    tensor = source.choice(made.inputs)
    change = source.randrange(10)
    if change == 0:
        tensor.datatype = source.choice(["INT64", "BOOL", "FP16", "UINT8", "", "BYTES", "FP64", "INT8"])
    elif change == 1:
        tensor.shape.append(source.choice([-1, 0, 1, 2**62]))
    elif change == 2:
        tensor.contents.int_contents.append(source.choice([-1, 300, 2**31 - 1]))
    elif change == 3:
        made.raw_input_contents.append(b"x")
    elif change == 4:
        made.parameters[source.choice(["stream", "timeout", "stop", "seed", "signature_name"])].int64_param = -5
    elif change == 5:
        made.parameters["top_p"].double_param = source.choice([float("nan"), float("inf"), 0.5])
    elif change == 6:
        made.outputs.add(name=source.choice(["", "text_output", "total"]))
    else:
        return mutated(source, made.SerializeToString())
    return bytes(made.SerializeToString())


def test_mutated_messages(addresses: tuple[str, str], caplog: pytest.LogCaptureFixture) -> None:
    source = random.Random(6)
    seen: dict[grpc.StatusCode, int] = {}
    with grpc.insecure_channel(addresses[1]) as channel:
        infer = channel.unary_unary(f"/{INFERENCE_SERVICE}/ModelInfer")
        others = [channel.unary_unary(f"/{INFERENCE_SERVICE}/{name}") for name in ("ModelMetadata", "RepositoryIndex")]
        for _ in range(ROUNDS):
            data = edited(source, source.choice(requests()))
            ask = source.choice(others) if source.random() < 0.1 else infer
            code = grpc.StatusCode.OK
            try:
                ask(data, timeout=10)
            except grpc.RpcError as error:
                code = error.code()
                assert "\n" not in error.details(), data
            seen[code] = seen.get(code, 0) + 1
            assert code.name in ("OK", "INVALID_ARGUMENT", "NOT_FOUND"), (data, code)
        stream = channel.stream_stream(f"/{INFERENCE_SERVICE}/ModelStreamInfer")
        sent = [edited(source, source.choice(requests())) for _ in range(ROUNDS)]
        answers = [service_pb2.ModelStreamInferResponse.FromString(data) for data in stream(iter(sent), timeout=60)]
    finals = [each.infer_response.parameters["triton_final_response"].bool_param for each in answers]
    refused = [each.error_message for each in answers if each.error_message]
    assert sum(finals) + len(refused) == ROUNDS and sum(finals) > ROUNDS / 20
    assert not [message for message in refused if "internal error" in message]
    assert seen[grpc.StatusCode.INVALID_ARGUMENT] > ROUNDS / 4 and seen[grpc.StatusCode.OK] > ROUNDS / 20, seen
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


def long_messages() -> dict[str, bytes]:
    """Messages that are wrong in a hundred thousand places."""
    message = service_pb2.ModelInferRequest
    tensor = message.InferInputTensor
    contents = service_pb2.InferTensorContents
    many = 300_000
    values = contents(int_contents=[1] * many)
    ids = tensor(name="token_ids", datatype="INT32", shape=[1, 5], contents=values)
    texts = tensor(name="text_input", datatype="BYTES", shape=[many], contents=contents(bytes_contents=[b""] * many))
    return {
        "inputs": message(model_name="tiny", inputs=[tensor()] * many).SerializeToString(),
        "outputs": message(
            model_name="tiny", outputs=[message.InferRequestedOutputTensor()] * many
        ).SerializeToString(),
        "values": message(model_name="tiny", inputs=[ids]).SerializeToString(),
        "texts": message(model_name="tiny", inputs=[texts]).SerializeToString(),
        "shape": message(model_name="tiny", inputs=[tensor(datatype="BYTES", shape=[1] * many)]).SerializeToString(),
        "raw": message(model_name="tiny", raw_input_contents=[b""] * many).SerializeToString(),
    }


def test_long_wrong_messages_are_refused_at_once(addresses: tuple[str, str]) -> None:
    with grpc.insecure_channel(addresses[1]) as channel:
        infer = channel.unary_unary(f"/{INFERENCE_SERVICE}/ModelInfer")
        for name, data in long_messages().items():
            assert len(data) <= 4 << 20, name
            with pytest.raises(grpc.RpcError) as caught:
                infer(data, timeout=20)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, (name, caught.value.details())
            assert len(caught.value.details()) < 600, name
