"""TensorFlow Serving's gRPC services of our own server, by the official stubs and our own client."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.framework import types_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    predict_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)

from serving.clients.grpc_transport import GrpcTransport
from serving.clients.tf_serving import TFServingClient
from serving.engine.api import RequestRecord, StepRecord
from serving.entrypoints.grpc_server import start_grpc
from serving.entrypoints.runner import LOOPBACK
from serving.errors import ServerError
from serving.generation import generate
from serving.protobuf import tf_serving as tf_messages
from serving.protobuf.tf_serving import MESSAGES
from serving.protocols.tf_serving.grpc import array_of
from serving.protocols.tf_serving.signatures import SIGNATURES
from serving.server.settings import Settings
from serving.server.state import Server
from tests.closed_form import ClosedFormBackend, greedy
from tests.serving.double_engine import DoubleEngine, registry_of
from tests.serving.protocols.tf_serving.test_rest import FEW, PROMPTS, batch
from tests.tiny_build import Fails

KEY = "correct-horse"
DTYPES = {"temperature": np.float32, "top_p": np.float32, "seed": np.int64}


@pytest.fixture(scope="module")
def engine() -> Iterator[DoubleEngine]:
    engine = DoubleEngine(slots=8, queue=256)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def addresses(engine: DoubleEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """An open server's address, and that of one that wants a key."""
    registry = registry_of(engine, tmp_path_factory.mktemp("grpc") / "tiny")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def call(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(20)

    each = [Server(registry, Settings()), Server(registry, Settings(api_keys=(KEY,)))]
    servers = [call(start_grpc(server, "127.0.0.1", 0)) for server in each]
    yield f"127.0.0.1:{servers[0].port}", f"127.0.0.1:{servers[1].port}"
    for server in servers:
        call(server.stop(1))
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def arrays(columns: dict[str, Any]) -> dict[str, Any]:
    return {name: np.array(value, DTYPES.get(name, np.int32)) for name, value in columns.items()}


def test_tokens_text_and_metadata(addresses: tuple[str, str]) -> None:
    client = TFServingClient(GrpcTransport(addresses[0], "tiny"))
    got = client.predict(arrays(batch(PROMPTS)))
    made = generate(ClosedFormBackend(257, 1024), PROMPTS, FEW, 256)
    for row, length, wanted in zip(got["token_ids"], got["lengths"], made, strict=True):
        assert row[:length].tolist() == list(wanted.token_ids)
    (text,) = client.generate(["naïve ☃"], FEW)
    assert 1 <= text.tokens <= 6
    assert set(client.metadata()) == set(SIGNATURES)
    assert client.status() == [{"version": 1, "state": "AVAILABLE", "error_code": "OK", "error_message": ""}]


def test_what_is_wrong(addresses: tuple[str, str]) -> None:
    client = TFServingClient(GrpcTransport(addresses[0], "tiny"))
    good = arrays(batch([[1, 2]]))
    for changes, words in [
        ({"lengths": np.array([0], np.int32)}, "may not be empty"),
        ({"token_ids": np.array([[1, 2]], np.int64)}, "must be DT_INT32"),
        ({"token_ids": np.array([[1, 257]], np.int32)}, "from 0 to 256"),
        ({"temperature": np.array([np.nan], np.float32)}, "finite number"),
        ({"max_new_tokens": np.array([0], np.int32)}, "at least 1"),
    ]:
        with pytest.raises(ServerError, match=words) as caught:
            client.predict(good | changes)
        assert caught.value.code == "INVALID_ARGUMENT"
    with pytest.raises(ServerError, match="2 axes"):
        GrpcTransport(addresses[0], "tiny").predict(
            "serving_default", good | {"token_ids": np.array([1], np.int32)}, 10.0
        )
    with pytest.raises(ServerError, match="nobody") as caught:
        TFServingClient(GrpcTransport(addresses[0], "nobody")).status()
    assert caught.value.code == "NOT_FOUND"
    stub = prediction_service_pb2_grpc.PredictionServiceStub(grpc.insecure_channel(addresses[0]))
    with pytest.raises(grpc.RpcError, match="not offered here"):
        stub.Regress(regression_pb2.RegressionRequest())
    broken = predict_pb2.PredictRequest()
    broken.model_spec.name = "tiny"
    broken.model_spec.signature_name = "tokenize"
    broken.inputs["text"].dtype = 7
    broken.inputs["text"].tensor_shape.dim.add(size=2**62)
    with pytest.raises(grpc.RpcError, match="it may have 1048576"):
        stub.Predict(broken)


@pytest.mark.parametrize("kind", ["float32", "float64", "int32", "int64", "uint8", "bool", "uint64", "object"])
@pytest.mark.parametrize("shape", [[], [3], [2, 2], [0], [2, 0]])
@pytest.mark.parametrize("given", [0, 1])
def test_a_tensor_with_fewer_values_than_its_shape_is_read_as_tensorflow_does(
    kind: str, shape: list[int], given: int
) -> None:
    tensor = tf.make_tensor_proto(np.full([1], b"x" if kind == "object" else 1, kind))
    tensor.ClearField("tensor_shape")
    for size in shape:
        tensor.tensor_shape.dim.add(size=size)
    if not given or 0 in shape:
        tensor.CopyFrom(type(tensor)(dtype=tensor.dtype, tensor_shape=tensor.tensor_shape))
    own = tf_messages.MESSAGES["TensorProto"].FromString(tensor.SerializeToString())
    # The runtime's reader, which servers use; `tf.make_ndarray` is another one.
    wanted = tf.raw_ops.ParseTensor(serialized=tensor.SerializeToString(), out_type=tensor.dtype).numpy()
    found = array_of("x", own)
    np.testing.assert_array_equal(found, wanted)
    assert found.shape == np.shape(wanted)


def test_bytes_that_are_no_message_are_the_callers_fault(addresses: tuple[str, str]) -> None:
    with grpc.insecure_channel(addresses[0]) as channel:
        predict = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
        with pytest.raises(grpc.RpcError, match="is no PredictRequest") as caught:
            predict(b"\xff\xff")
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]


def test_a_deadline_frees_the_slot(addresses: tuple[str, str], engine: DoubleEngine) -> None:
    endless = next([token] for token in range(256) if 256 not in greedy([token], 100, 257))
    engine.pace = 0.02
    try:
        client = TFServingClient(GrpcTransport(addresses[0], "tiny"), timeout=0.3)
        with pytest.raises(ServerError) as caught:
            client.predict(arrays(batch([endless], max_new_tokens=1000)))
        assert caught.value.code == "DEADLINE_EXCEEDED"
        deadline = time.monotonic() + 5
        while engine.stats().active_slots and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.stats().active_slots == 0
    finally:
        engine.pace = 0.0


def test_a_requests_name_reaches_the_engine(addresses: tuple[str, str], engine: DoubleEngine) -> None:
    class Names:
        def __init__(self) -> None:
            self.seen: list[str] = []

        def on_step(self, record: StepRecord) -> None:
            pass

        def on_finish(self, record: RequestRecord) -> None:
            self.seen.append(record.request_id)

    engine.observer = names = Names()
    try:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(grpc.insecure_channel(addresses[0]))
        request = predict_pb2.PredictRequest()
        request.model_spec.name = "tiny"
        for name, value in arrays(batch([[7, 8]], max_new_tokens=2)).items():
            request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
        for metadata in ([("x-request-id", "mine-1")], []):
            stub.Predict(request, metadata=metadata)
        # The engine tells its observer behind the last event, so the answer may be here first.
        deadline = time.monotonic() + 5
        while len(names.seen) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        engine.observer = None
    assert "mine-1" in names.seen and sorted(map(len, names.seen)) == [6, 32]


def test_wrong_keys_are_limited_as_by_http(engine: DoubleEngine, tmp_path: Path) -> None:
    server = Server(registry_of(engine, tmp_path / "tiny"), Settings(api_keys=(KEY,), wrong_keys=3))

    async def ask() -> list[str]:
        running = await start_grpc(server, LOOPBACK, 0)
        codes = []
        # Both of the loopback's addresses answer; each is a caller of its own.
        for address in (f"127.0.0.1:{running.port}", f"[::1]:{running.port}"):
            async with grpc.aio.insecure_channel(address) as channel:
                stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
                request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
                request.model_spec.name = "tiny"
                for key in [*["wrong-key-1"] * 5, KEY]:
                    try:
                        await stub.GetModelMetadata(request, metadata=[("authorization", f"Bearer {key}")])
                        codes.append("OK")
                    except grpc.aio.AioRpcError as error:
                        codes.append(error.code().name)
        await running.stop(0)
        return codes

    assert asyncio.run(ask()) == [*["UNAUTHENTICATED"] * 3, *["RESOURCE_EXHAUSTED"] * 2, "OK"] * 2


def test_keys(addresses: tuple[str, str]) -> None:
    with pytest.raises(ServerError, match="needs an API key"):
        TFServingClient(GrpcTransport(addresses[1], "tiny")).status()
    stub = prediction_service_pb2_grpc.PredictionServiceStub(grpc.insecure_channel(addresses[1]))
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = "tiny"
    answer = stub.GetModelMetadata(request, metadata=[("authorization", f"Bearer {KEY}")])
    assert answer.model_spec.name == "tiny"


@pytest.mark.parametrize("option", ["--stream", "--stop=x", "--ignore-eos"])
def test_what_needs_slots_is_one_line(addresses: tuple[str, str], fails: Fails, option: str) -> None:
    command = ["client", "generate", "a", option, "--grpc", addresses[0], "--model", "tiny", "--json"]
    fails(command, 2, f"{option.partition('=')[0]} needs a served model with slots", "name it by --url")


def test_the_client_needs_no_tensorflow() -> None:
    code = (
        "import sys; from serving.clients.grpc_transport import GrpcTransport; GrpcTransport('127.0.0.1:1', 'm');"
        "assert not {'tensorflow', 'tensorflow_serving'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_types_have_the_official_numbers() -> None:
    names = types_pb2.DataType.DESCRIPTOR.values_by_number
    assert {f"DT_{name}": number for number, name in tf_messages.DTYPES.items()} == {
        names[number].name: number for number in tf_messages.DTYPES
    }


def test_messages_have_the_official_names_and_numbers() -> None:
    official = [predict_pb2.PredictRequest, predict_pb2.PredictResponse, get_model_status_pb2.GetModelStatusResponse]
    official += [get_model_metadata_pb2.GetModelMetadataRequest, get_model_metadata_pb2.GetModelMetadataResponse]
    official += [get_model_metadata_pb2.SignatureDefMap, get_model_status_pb2.GetModelStatusRequest]
    seen = set()

    def compare(ours: Any, theirs: Any) -> None:
        seen.add(ours.full_name)
        for field in ours.fields:
            other = theirs.fields_by_name[field.name]
            kinds = (field.number, field.type, field.is_repeated)
            # Enumerations are their numbers here.
            assert kinds == (other.number, 5 if other.type == 14 else other.type, other.is_repeated), field.full_name
            if field.message_type is not None and field.message_type.full_name not in seen:
                compare(field.message_type, other.message_type)

    for each in official:
        compare(MESSAGES[each.DESCRIPTOR.name].DESCRIPTOR, each.DESCRIPTOR)
    assert {each.DESCRIPTOR.full_name for name, each in MESSAGES.items() if name != "Empty"} <= seen


def test_the_services_need_no_tensorflow() -> None:
    code = (
        "import sys, serving.protocols.tf_serving.grpc; sys.exit(any(m.startswith('tensorflow') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
