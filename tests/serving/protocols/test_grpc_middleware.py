"""Every gRPC call has an id, a line in the log and a count."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import grpc
import pytest

from serving.entrypoints.grpc_server import start_grpc
from serving.protobuf.open_inference import INFERENCE_SERVICE
from serving.protobuf.tf_serving import MODEL_SERVICE, PREDICTION_SERVICE
from serving.server.settings import Settings
from serving.server.state import Server
from tests.serving.double_engine import DoubleEngine, registry_of

LIVE = f"{INFERENCE_SERVICE}/ServerLive"
STATUS = f"{MODEL_SERVICE}/GetModelStatus"
REGRESS = f"{PREDICTION_SERVICE}/Regress"
STREAM = f"{INFERENCE_SERVICE}/ModelStreamInfer"


def test_calls_are_named_logged_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = DoubleEngine()
    server = Server(registry_of(engine, tmp_path / "tiny"), Settings())
    trailing: list[dict[str, Any]] = []

    async def ask(channel: Any, method: str, message: bytes, **fields: Any) -> None:
        made = channel.unary_unary(f"/{method}")(message, **fields)
        try:
            await made
        except grpc.aio.AioRpcError as error:
            trailing.append(dict(error.trailing_metadata() or ()))
        else:
            trailing.append(dict(await made.trailing_metadata()))

    async def main() -> None:
        listening = await start_grpc(server, "127.0.0.1", 0)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{listening.port}") as channel:
            await ask(channel, LIVE, b"")
            await ask(channel, STATUS, b"\x0a\x06\x0a\x04tiny", metadata=(("x-request-id", "mine-1"),))
            await ask(channel, STATUS, b"\xff")
            await ask(channel, REGRESS, b"")
            stream = channel.stream_stream(f"/{STREAM}")()
            await stream.done_writing()
            assert await stream.read() is grpc.aio.EOF
        await listening.stop(1)

    with caplog.at_level(logging.INFO, "gpt2_bundle.access"):
        asyncio.run(main())
    engine.close()
    expected = [(STATUS, "OK"), (STATUS, "INVALID_ARGUMENT"), (REGRESS, "UNIMPLEMENTED"), (STREAM, "OK")]
    records = [vars(record) for record in caplog.records]
    assert [(record["method"], record["code"]) for record in records] == expected
    assert trailing[1]["x-request-id"] == "mine-1" == records[0]["request_id"]
    assert len(trailing[2]["x-request-id"]) == 32 and trailing[2]["x-request-id"] == records[1]["request_id"]
    counted = {
        (sample.labels["method"], sample.labels["code"]): sample.value
        for metric in server.metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "gpt2_bundle_grpc_requests_total"
    }
    assert counted == dict.fromkeys([(LIVE, "OK"), *expected], 1)
