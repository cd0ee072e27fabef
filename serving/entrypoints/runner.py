"""Runs the application: a socket, a model that loads while probes are answered, and an end that loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import logging
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import uvicorn
from starlette.applications import Starlette

from serving.entrypoints.http_limits import limited
from serving.entrypoints.model_manager import ModelManager
from serving.errors import GPT2BundleError, InputError
from serving.server.registry import ServedModel
from serving.server.state import Server

# Python has no name for Linux's option.
_SO_ATTACH_FILTER = 26
_ACCEPT_SECONDS = 0.2
# Windows knows no SIGHUP, which a terminal sends that is closed.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_OWN_FILES = 100
LOOPBACK = "localhost"
"""Both of this machine's own addresses, 127.0.0.1 and ::1."""
FLUSH_SECONDS = 5
"""For answers that are complete to reach their clients."""
log = logging.getLogger("gpt2_bundle.server")


class Companion(Protocol):
    """A server of another protocol, such as gRPC; it refuses calls by itself while no model is ready or all drain."""

    async def start(self) -> None:
        """Begin to answer. Raises GPT2BundleError."""

    async def stop(self, grace: float) -> None:
        """Take nothing new, and end after `grace` seconds at most; may be called twice, and before `start`."""


@dataclass(frozen=True)
class Address:
    """Where to listen; certificate and key make it HTTPS."""

    host: str = LOOPBACK
    port: int = 8000
    certificate: Path | None = None
    key: Path | None = None
    option: str = "--port"
    """What chooses the port, for errors."""

    def bind(self) -> socket.socket:
        """The bound socket, so that a port that is taken is known before a model loads. Raises GPT2BundleError.

        It is that of IPv4 where the host is LOOPBACK; `beside` gives the other one.
        """
        host = "127.0.0.1" if self.host == LOOPBACK else self.host
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, self.port))
            listener.listen(1024)
        except (OSError, OverflowError) as error:
            listener.close()
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                raise GPT2BundleError(
                    f"port {self.port} on {host} is taken; choose another with {self.option}"
                ) from None
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise GPT2BundleError(f"cannot listen on {host} port {self.port}: {reason}") from None
        return listener

    def beside(self, listener: socket.socket) -> list[socket.socket]:
        """IPv6's loopback at the port of `listener`, as some clients find no other "localhost"; none without IPv6."""
        if self.host != LOOPBACK:
            return []
        port = listener.getsockname()[1]
        try:
            return [replace(self, host="::1", port=port).bind()]
        except GPT2BundleError as error:
            log.info("not on IPv6's loopback: %s", error)
            return []

    def url(self, listener: socket.socket) -> str:
        """What a client asks."""
        host = "127.0.0.1" if self.host == LOOPBACK else f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.certificate else 'http'}://{host}:{listener.getsockname()[1]}"


class _Uvicorn(uvicorn.Server):
    """uvicorn whose signals begin a drain instead of refusing requests that wait."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_signal = on_signal

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)


class Runner:
    """One server from its start to its end."""

    def __init__(
        self,
        app: Starlette,
        versions: ModelManager,
        address: Address,
        watch: float,
        companions: Sequence[Companion] = (),
    ) -> None:
        """`watch` is seconds between two looks at the versions' folder; 0 never looks again."""
        self._app, self._versions, self._address, self._watch = app, versions, address, watch
        self._companions = companions
        self._server: Server = app.state.server
        self._error: BaseException | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._hurried = False
        self._loading: asyncio.Task[None] | None = None

    def run(self, announce: Callable[[str, ServedModel], None]) -> None:
        """Serve until a signal; `announce` is called with the URL once the model answers.

        The first signal drains: new requests get 503, accepted ones end or run into the drain's timeout. A second one
        does not wait: what is left gets an error. Raises what keeps the server from starting.
        """
        listener = self._address.bind()
        self._listeners = listeners = [listener, *self._address.beside(listener)]
        config = uvicorn.Config(
            self._app,
            log_config=None,
            # Nothing here needs it, and a second signal would have it log a traceback.
            lifespan="off",
            http=limited(_connections(self._server.settings.max_connections)),
            ws="none",
            access_log=False,
            server_header=False,
            # A proxy on this machine may come by either address.
            forwarded_allow_ips=os.environ.get("FORWARDED_ALLOW_IPS", "127.0.0.1,::1"),
            ssl_certfile=_given(self._address.certificate),
            ssl_keyfile=_given(self._address.key),
            # What `_leave` does comes before, and says what it does.
            timeout_graceful_shutdown=FLUSH_SECONDS + 2,
            timeout_keep_alive=75,
        )
        try:
            config.load()
        except OSError as error:
            _close(listeners)
            raise InputError(
                f"the certificate or its key cannot be used: {error}; check --ssl-certfile and --ssl-keyfile"
            ) from None
        self._uvicorn = _Uvicorn(config, self._on_signal)
        try:
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                runner.run(self._serve(listeners, announce))
        finally:
            self._versions.close()
            _close(listeners)
        if self._error is not None:
            raise self._error

    async def _serve(self, listeners: list[socket.socket], announce: Callable[[str, ServedModel], None]) -> None:
        self._loading = self._spawn(self._load(self._address.url(listeners[0]), announce))
        try:
            await self._uvicorn.serve(sockets=listeners)
        finally:
            for companion in self._companions:
                await companion.stop(0)

    def _spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _load(self, url: str, announce: Callable[[str, ServedModel], None]) -> None:
        try:
            # First, so that what keeps them from starting is known before a model loads.
            for companion in self._companions:
                await companion.start()
            model = await asyncio.to_thread(self._versions.start)
        except BaseException as error:
            self._error = error
            self._uvicorn.should_exit = True
            return
        if self._server.draining:
            return
        if self._watch:
            self._versions.watch(self._watch)
        announce(url, model)

    def _on_signal(self) -> None:
        if self._server.draining:
            if self._still_loading():
                # A thread inside a runtime's own code cannot be ended, and nothing was accepted yet.
                log.info("a second signal: left while the model was loading")
                logging.shutdown()
                os._exit(0)
            if self._hurried:
                self._uvicorn.force_exit = self._uvicorn.should_exit = True
                return
            self._hurried = True
            self._spawn(self._hurry())
            return
        self._server.draining = True
        self._spawn(self._drain())

    def _still_loading(self) -> bool:
        return self._loading is not None and not self._loading.done()

    async def _hurry(self) -> None:
        """End what is left with an error of its own, so that clients see one and not a cut connection."""
        work = [asyncio.to_thread(self._versions.drain, 0), *(companion.stop(0) for companion in self._companions)]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*work), FLUSH_SECONDS)
        await self._leave()

    async def _drain(self) -> None:
        if self._loading is not None and self._still_loading():
            log.info("the model is still loading; the server ends once it has, or at a second signal")
            await self._loading
        timeout = self._server.settings.drain_timeout
        log.info("draining: nothing new is taken, and what was accepted has %g s to end", timeout)
        stops = [companion.stop(timeout) for companion in self._companions]
        done, *_ = await asyncio.gather(asyncio.to_thread(self._versions.drain, timeout), *stops)
        in_time = done and not self._hurried
        log.info("every accepted request has ended" if in_time else "the time is over; what was left got an error")
        await self._leave()

    async def _leave(self) -> None:
        """Let uvicorn end, and close the connections of clients that neither take their answer nor send their body."""
        for listener in self._listeners:
            refuse_connections(listener)
        # Those that the system took before are accepted now, read and answered.
        await asyncio.sleep(_ACCEPT_SECONDS)
        self._uvicorn.should_exit = True
        await asyncio.sleep(FLUSH_SECONDS)
        stuck = list(self._uvicorn.server_state.connections)
        if stuck:
            log.warning("closed %d connections whose clients did not send or take what was left", len(stuck))
        for connection in stuck:
            connection.transport.abort()


def refuse_connections(listener: socket.socket) -> None:
    """Have the system take no new connection for `listener`, while those that it took already can be accepted.

    Closing it alone would reset these. A filter drops the packets that ask for one (SYN); their senders repeat them
    after a second, and find the socket closed. Only Linux has such filters; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        # Classic BPF: load byte 13 of the TCP header, its flags; pass the whole packet on, or, with SYN, none of it.
        code = [(0x30, 0, 0, 13), (0x45, 1, 0, 0x02), (0x06, 0, 0, 0xFFFFFFFF), (0x06, 0, 0, 0)]
        program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in code))
        described = struct.pack("HP", len(code), ctypes.addressof(program))
        with contextlib.suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, described)


def _close(listeners: Sequence[socket.socket]) -> None:
    for listener in listeners:
        listener.close()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where there is one; None is asyncio's own."""
    try:
        import uvloop
    except ModuleNotFoundError:  # It has no form for Windows.
        return None
    return uvloop.new_event_loop


def _connections(most: int) -> int:
    """How many connections there may be, so that the process can still open files of its own."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows has no such limit.
        return most
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, most if files == resource.RLIM_INFINITY else min(most, files - _OWN_FILES))


def _given(path: Path | None) -> str | None:
    return None if path is None else str(path)
