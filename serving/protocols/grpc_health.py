"""gRPC's health checking protocol, grpc.health.v1 (grpc/grpc, doc/health-checking.md), by its one plain call.

Kubernetes' gRPC probes and load balancers ask by it. `Watch` is left out; the protocol has clients that ask by it take
UNIMPLEMENTED for a server without such checks.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from serving.protobuf.tables import message_classes
from serving.server.registry import ModelNotFoundError
from serving.server.state import Server

HEALTH_SERVICE = "grpc.health.v1.Health"
MESSAGES = message_classes(
    "grpc.health.v1", {"HealthCheckRequest": "service:string=1", "HealthCheckResponse": "status:int32=1"}
)
_SERVING, _NOT_SERVING = 1, 2


class Health:
    """Whether requests should come here, for the server as a whole, whose name is empty, and each of `services`."""

    def __init__(self, server: Server, services: Collection[str]) -> None:
        self._server, self._services = server, frozenset(("", *services))

    async def check(self, request: Any, context: Any) -> Any:
        """Check: SERVING where /health/ready says 200. Raises ModelNotFoundError for a service that is not here."""
        if request.service not in self._services:
            raise ModelNotFoundError(f"no service {request.service[:80]!r} is offered here")
        status = _SERVING if self._server.unready() is None else _NOT_SERVING
        return MESSAGES["HealthCheckResponse"](status=status)
