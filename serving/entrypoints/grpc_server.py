"""The gRPC port: services over the engine in the server's own event loop, with the keys and limits of HTTP."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from serving.engine.api import DrainingError
from serving.entrypoints.runner import LOOPBACK, Address
from serving.errors import GPT2BundleError, RuntimeMissingError
from serving.server.auth import CALLER
from serving.server.errors import UnauthenticatedError
from serving.server.grpc_middleware import client_of, guarded, unary
from serving.server.state import Server

log = logging.getLogger("gpt2_bundle.server")


class GrpcServer:
    """A started server; `port` is the one it listens on."""

    def __init__(self, server: Any, port: int) -> None:
        self._server, self.port = server, port

    async def stop(self, grace: float) -> None:
        """Take no new calls, let the running ones end within `grace` seconds, then cancel them."""
        await self._server.stop(grace)


class GrpcCompanion:
    """The gRPC port as a `serving.entrypoints.runner.Companion`; the arguments are those of `start_grpc`."""

    def __init__(self, server: Server, host: str, port: int, tls: tuple[bytes, bytes] | None = None) -> None:
        self._server, self._host, self._port, self._tls = server, host, port, tls
        self._running: GrpcServer | None = None

    async def start(self) -> None:
        """See `Companion.start`."""
        self._running = await start_grpc(self._server, self._host, self._port, self._tls)
        log.info("gRPC at %s port %d", self._host, self._running.port)

    async def stop(self, grace: float) -> None:
        """See `Companion.stop`."""
        if self._running is not None:
            await self._running.stop(grace)


async def start_grpc(server: Server, host: str, port: int, tls: tuple[bytes, bytes] | None = None) -> GrpcServer:
    """Listen on `host`:`port` (0 takes a free one) until `GrpcServer.stop`; `tls` is a private key and a chain in PEM.

    Raises RuntimeMissingError without grpcio and protobuf, and GPT2BundleError if the address cannot be had.
    """
    try:
        import grpc

        from serving.protobuf.open_inference import INFERENCE_SERVICE
        from serving.protobuf.tf_serving import PREDICTION_SERVICE
        from serving.protocols import grpc_health
        from serving.protocols.open_inference.grpc import OpenInference
        from serving.protocols.tf_serving.grpc import TensorFlowServing
    except ImportError as error:
        raise RuntimeMissingError(
            f"gRPC needs {error.name}, which is not installed; pip install 'gpt2-bundle[serve]', or leave out the port"
        ) from None
    limit = server.settings.max_body_bytes
    listening = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
        ]
    )
    v2 = OpenInference(server, lambda context: _timeout(server, context), lambda context: _admit(server, context))

    def admit(context: Any) -> None:
        _admit(server, context)

    tensorflow = TensorFlowServing(server, lambda context: _timeout(server, context))
    services = {
        service: {name: (handler, asked) for name, (handler, asked, _) in methods.items()}
        for service, methods in tensorflow.methods().items()
    }
    services[INFERENCE_SERVICE] = v2.methods()
    for service, methods in services.items():
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                unary(server, f"{service}/{name}", handler, asked, admit), None, _serialize
            )
            for name, (handler, asked) in methods.items()
        }
        if service == INFERENCE_SERVICE:
            for name, (handler, asked) in v2.open_methods().items():
                probe = unary(server, f"{service}/{name}", handler, asked, None)
                handlers[name] = grpc.unary_unary_rpc_method_handler(probe, None, _serialize)
            name = "ModelStreamInfer"
            # Each request of a stream counts for the rate limit, and not the stream.
            streaming = guarded(
                server, f"{service}/{name}", v2.stream, lambda context: _admit(server, context, counted=False)
            )
            handlers[name] = grpc.stream_stream_rpc_method_handler(streaming, None, _serialize)
        if service == PREDICTION_SERVICE:
            streaming = guarded(server, f"{service}/PredictStreamed", tensorflow.predict_streamed, admit)
            handlers["PredictStreamed"] = grpc.stream_stream_rpc_method_handler(streaming, None, _serialize)
        listening.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    check = grpc_health.Health(server, services).check
    probe = unary(
        server, f"{grpc_health.HEALTH_SERVICE}/Check", check, grpc_health.MESSAGES["HealthCheckRequest"], None
    )
    health = {"Check": grpc.unary_unary_rpc_method_handler(probe, None, _serialize)}
    listening.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(grpc_health.HEALTH_SERVICE, health),))
    # gRPC itself says to the log, and not in its error, why an address cannot be had.
    Address(host, port, option="--grpc-port").bind().close()
    credentials = None if tls is None else grpc.ssl_server_credentials([tls])

    def add(host: str, port: int) -> int:
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if credentials is None:
            return int(listening.add_insecure_port(address))
        return int(listening.add_secure_port(address, credentials))

    try:
        bound = add("127.0.0.1" if host == LOOPBACK else host, port)
        if host == LOOPBACK:
            with contextlib.suppress(RuntimeError):  # Without IPv6.
                add("::1", bound)
    except RuntimeError:
        raise GPT2BundleError(f"gRPC cannot listen on {host} port {port}; choose another with --grpc-port") from None
    await listening.start()
    return GrpcServer(listening, bound)


def _serialize(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def _timeout(server: Server, context: Any) -> float | None:
    """Seconds that a call may take: the client's deadline, at most the server's own limit."""
    limits = [seconds for seconds in (context.time_remaining(), server.settings.request_timeout) if seconds is not None]
    return max(1e-3, min(limits)) if limits else None


def _admit(server: Server, context: Any, counted: bool = True) -> None:
    """Refuse callers without a valid key or over the rate limit; `counted` is a request for the rate limit."""
    metadata = dict(context.invocation_metadata() or ())
    try:
        caller = server.keys.check(metadata.get("authorization"))
    except UnauthenticatedError:
        server.wrong_keys.take(client_of(context))
        raise
    CALLER.set(caller or "")
    if counted:
        server.limiter.take(caller or client_of(context))
    if server.draining:
        raise DrainingError("the server is shutting down; ask another one or try again")
