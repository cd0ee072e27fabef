"""A page to try a model by hand, at "/": three files of this folder, which ask nothing but this server."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serving.server.callers import is_kserve_client

_FILES = {
    "/": ("index.html", "text/html"),
    "/playground.css": ("playground.css", "text/css"),
    "/playground.js": ("playground.js", "text/javascript"),
}
PATHS = tuple(_FILES)
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""No inline script or style, nothing from elsewhere, and no framing by other pages."""


def _route(path: str, name: str, media_type: str) -> Route:
    async def file(request: Request) -> Response:
        if path == "/" and is_kserve_client(request.headers):
            return JSONResponse({"status": "alive"})  # Liveness in KServe's V1 protocol.
        return Response((files(__package__) / name).read_bytes(), media_type=media_type, headers=_HEADERS)

    return Route(path, file, include_in_schema=False)


def playground_routes() -> list[Route]:
    """The routes of the page."""
    return [_route(path, *file) for path, file in _FILES.items()]
