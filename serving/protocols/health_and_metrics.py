"""Health and metrics: what a supervisor and a scraper ask."""

from __future__ import annotations

from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serving import __version__
from serving.server.state import Server


async def live(request: Request) -> Response:
    """200 as long as the process answers at all."""
    return JSONResponse({"status": "live"})


async def ready(request: Request) -> Response:
    """200 once every model has generated something, 503 with the reason before, and while draining."""
    server: Server = request.app.state.server
    reason = server.unready()
    if reason is None:
        return JSONResponse({"status": "ready"})
    return JSONResponse({"status": "not ready", "reason": reason}, 503, {"Retry-After": "1"})


async def metrics(request: Request) -> Response:
    """All metrics in Prometheus's text format."""
    server: Server = request.app.state.server
    return Response(generate_latest(server.metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def version(request: Request) -> Response:
    """The server's version."""
    return JSONResponse({"version": __version__})


def operations_routes() -> list[Route]:
    """The routes of this module; `/health`, `/ping` and `/version` are where vLLM and SageMaker have theirs."""
    return [
        Route("/health/live", live),
        Route("/health/ready", ready),
        Route("/health", ready),
        Route("/ping", ready),
        Route("/version", version),
        Route("/metrics", metrics),
    ]
