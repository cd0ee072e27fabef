"""An engine of known arithmetic behind HTTP and gRPC, for the tests of the Open Inference Protocol."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from starlette.routing import BaseRoute

from serving.entrypoints.grpc_server import start_grpc
from serving.entrypoints.http_app import build_app
from serving.protocols.open_inference import http as open_inference_http
from serving.protocols.tf_serving import rest as tf_rest
from serving.server.registry import ModelRegistry
from serving.server.settings import Settings
from serving.server.state import Server
from tests.serving.live_server import running


def all_routes(registry: ModelRegistry, settings: Settings) -> list[BaseRoute]:
    """The routes that the command adds."""
    return [*tf_rest.routes(registry, settings), *open_inference_http.routes()]


@contextlib.contextmanager
def serving_both(server: Server) -> Iterator[tuple[str, str]]:
    """The URL of HTTP and the address of gRPC while the block runs."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def call(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(20)

    listening = call(start_grpc(server, "127.0.0.1", 0))
    app = build_app(server.registry, server.settings, all_routes(server.registry, server.settings), server)
    try:
        with running(app) as url:
            yield url, f"127.0.0.1:{listening.port}"
    finally:
        call(listening.stop(1))
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
