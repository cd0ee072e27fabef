"""gRPC's health check, asked by bytes on the wire, as grpc.health.v1's .proto numbers them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc

from serving.entrypoints.grpc_server import start_grpc
from serving.protobuf.tf_serving import PREDICTION_SERVICE
from serving.server.settings import Settings
from serving.server.state import Server
from tests.serving.double_engine import DoubleEngine, registry_of

SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"


def test_the_health_check_follows_readiness_and_needs_no_key(tmp_path: Path) -> None:
    engine = DoubleEngine()
    server = Server(registry_of(engine, tmp_path / "tiny"), Settings(api_keys=("a-long-key",)))

    async def ask(channel: Any, service: str) -> Any:
        field = b"\x0a" + bytes([len(service)]) + service.encode() if service else b""
        try:
            return await channel.unary_unary("/grpc.health.v1.Health/Check")(field)
        except grpc.aio.AioRpcError as error:
            return error.code()

    async def main() -> list[Any]:
        listening = await start_grpc(server, "127.0.0.1", 0)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{listening.port}") as channel:
            answers = [await ask(channel, service) for service in ("", PREDICTION_SERVICE, "nobody")]
            server.draining = True
            answers.append(await ask(channel, ""))
        await listening.stop(1)
        return answers

    answers = asyncio.run(main())
    engine.close()
    assert answers == [SERVING, SERVING, grpc.StatusCode.NOT_FOUND, NOT_SERVING]
