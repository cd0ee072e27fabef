"""The Ray Serve application: an ingress that routes by prefix, and autoscaled replicas of `gpt2-bundle serve`.

A Serve configuration names it as `serving.ray.app:build`, with `args` as `RayOptions` has them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.commands.serve import build_server, server_settings
from serving.engine.api import QueueFullError
from serving.engine.config import EngineConfig
from serving.entrypoints import logging_setup
from serving.entrypoints.http_app import gated_app
from serving.errors import GPT2BundleError, one_line
from serving.protocols.health_and_metrics import live, version
from serving.ray.forwarding import ForwardedRequest, Forwarder, answer
from serving.ray.options import RayOptions, check_bundle, check_nodes, read_options
from serving.ray.request_router import class_path
from serving.server.errors import ReplicaLostError
from serving.server.registry import ModelNotReadyError, ModelRegistry
from serving.server.state import Server

REPLICA, INGRESS = "Replica", "Ingress"
# Ray's label of the head node. It holds the cluster's state, so an ingress there adds no other way to fail.
_HEAD = {"node:__internal_head__": 0.001}
_QUEUED = 256
"""Requests that wait for a place at a replica, for each replica that there may be; more get status 429."""
_LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.ObjectLostError,
    serve.exceptions.ReplicaUnavailableError,
)


class Replica:
    """One model with the application of `gpt2-bundle serve`, without its socket."""

    def __init__(self, options: RayOptions) -> None:
        # The ingress limits rates and answers other sites' pages; a replica would do so a second time.
        asked = {**options.serve_options(), "rate_limit": None, "cors_origin": ()}
        self._app, self._versions = build_server(Path(options.bundle), asked)
        self._versions.start()
        if asked["watch"]:
            self._versions.watch(asked["watch"])

    async def answer(self, request: ForwardedRequest) -> AsyncGenerator[list[Message], None]:
        """The ASGI messages of the answer."""
        async for batch in answer(self._app, request):
            yield batch

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        reason = self._app.state.server.unready()
        if reason is not None:
            raise ModelNotReadyError(reason)

    def __del__(self) -> None:
        if hasattr(self, "_versions"):
            self._versions.close()


@serve.ingress()
class Ingress:
    """Reads requests, checks keys and limits, and has a replica answer."""

    def __init__(self, options: RayOptions, replicas: Any) -> None:
        self._options = options
        self._method = replicas.options(stream=True).answer

    def __serve_build_asgi_app__(self) -> ASGIApp:
        asked = self._options.serve_options()
        logging_setup.configure(asked["log_format"], access=not asked["no_access_log"])
        settings = server_settings(asked)
        forwarder = Forwarder(self._call, settings.request_timeout, self._options.prefix_characters)
        ready = ("/health", "/health/ready", "/ping", "/v2/health/ready")
        routes = [
            *(Route(path, _ready) for path in ready),
            *(Route(path, live) for path in ("/health/live", "/v2/health/live")),
            Route("/version", version),
            Mount("/", forwarder),
        ]
        return _without_request_id(gated_app(routes, Server(ModelRegistry(), settings)))

    async def _call(self, request: ForwardedRequest) -> AsyncGenerator[list[Message], None]:
        response = self._method.remote(request)
        try:
            async for batch in response:
                yield batch
        except serve.exceptions.BackPressureError:
            raise QueueFullError("too many requests wait for a replica; try again", 1) from None
        except serve.exceptions.DeploymentUnavailableError:
            raise ModelNotReadyError("no replica of the model can start; the Ray cluster's status says why") from None
        except _LOST:
            raise ReplicaLostError("the replica that answered is gone; send the request again") from None
        except (asyncio.CancelledError, GeneratorExit):
            response.cancel()
            raise


def _without_request_id(app: ASGIApp) -> ASGIApp:
    """`app` without the header X-Request-Id in its answers, as Ray's proxy adds the same one."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if pair[0].lower() != b"x-request-id"]
            await send(message)

        await app(scope, receive, sending)

    return wrapped


async def _ready(request: Request) -> Response:
    """200: requests are taken, and wake a replica where there is none."""
    return JSONResponse({"status": "ready"})


def build(args: dict[str, Any]) -> Any:
    """The application, for `serve run` and `serve deploy`.

    Raises an error of one line for wrong `args`, for a bundle that this version cannot serve, and for a cluster in
    which no node could hold a replica.
    """
    try:
        options = read_options(args)
        asked = options.serve_options()
        memory = check_bundle(options)
        if options.check_resources:
            alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            check_nodes({**options.need(), "memory": float(memory)}, alive)
    except GPT2BundleError as error:
        raise type(error)(one_line(error)) from None
    seqs = asked["max_num_seqs"] or EngineConfig.slots
    deployment = serve.deployment(
        name=REPLICA,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus, "memory": memory},
        # Late binding: few requests wait at a replica, the others where the next free replica can take them.
        max_ongoing_requests=seqs + max(1, seqs // 4),
        max_queued_requests=_QUEUED * options.max_replicas,
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            # A full batch without a queue needs no further replica.
            "target_ongoing_requests": float(seqs),
            "upscale_delay_s": 10.0,
            "downscale_delay_s": 300.0,
        },
        request_router_config={
            "request_router_class": class_path(),
            "request_router_kwargs": {"spare": max(1, seqs // 2)},
        },
        graceful_shutdown_timeout_s=asked["drain_timeout"],
        health_check_period_s=10.0,
        max_constructor_retry_count=3,
    )(Replica)
    ingress = serve.deployment(
        name=INGRESS,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0, "resources": _HEAD},
        # It only waits; the limit is in front of the replicas.
        max_ongoing_requests=100_000,
        graceful_shutdown_timeout_s=asked["drain_timeout"],
    )(Ingress)
    return ingress.bind(options, deployment.bind(options))
