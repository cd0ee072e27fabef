"""Assembles the routes of all protocols behind the middleware."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute

from serving.protocols.health_and_metrics import operations_routes
from serving.protocols.openai import routes as openai
from serving.protocols.openai.chat import chat_routes
from serving.protocols.openai.tokenizer_info import tokenizer_info_routes
from serving.protocols.openai.tokens import token_routes
from serving.protocols.openapi import openapi_routes
from serving.server.middleware import Gate, on_http_exception
from serving.server.playground import playground_routes
from serving.server.registry import ModelRegistry
from serving.server.settings import Settings
from serving.server.state import Server


def build_app(
    registry: ModelRegistry, settings: Settings, extra_routes: Sequence[BaseRoute] = (), server: Server | None = None
) -> Starlette:
    """The ASGI application for the models of `registry`; `extra_routes` come before OpenAI's.

    Handlers find the `Server` as `request.app.state.server` and the request's id as `request.state.request_id`. Errors
    that a handler raises become answers by `serving.server.errors`.
    """
    routes = [
        *playground_routes(),
        *operations_routes(),
        *extra_routes,
        *openai.routes(),
        *tokenizer_info_routes(),
        *chat_routes(),
        *token_routes(),
        *openapi_routes(),
    ]
    return gated_app(routes, server or Server(registry, settings))


def gated_app(routes: Sequence[BaseRoute], server: Server) -> Starlette:
    """`routes` behind the middleware: API keys, limits, request ids, error answers, log and, if asked for, CORS."""
    middleware = [Middleware(Gate, server=server)]
    if server.settings.cors_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(server.settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After", "Inference-Header-Content-Length"],
        )
        middleware.insert(0, cors)
    app = Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: on_http_exception})
    app.state.server = server
    return app
