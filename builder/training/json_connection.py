"""JSON lines over a TCP connection, with bounds on their length and on silence."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
from collections.abc import Iterator
from typing import Any

_LONGEST_LINE = 1 << 20


class JsonConnection:
    """Sends and receives one JSON object a line.

    Args:
        connection: a connected socket, which this object owns.
        silence: seconds without a byte after which reading and writing raise TimeoutError.
    """

    def __init__(self, connection: socket.socket, silence: float) -> None:
        self.socket = connection
        self._silence = silence
        self._lock = threading.Lock()
        self._pending = b""
        connection.settimeout(silence)

    def send(self, message: dict[str, Any]) -> None:
        """Send one message. Raises OSError if the other side is gone."""
        with self._lock:
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout: float | None = None) -> dict[str, Any]:
        """Return the next message.

        Raises ConnectionError at the end, TimeoutError after `timeout` (by default the silence), and ValueError for
        what is not a message.
        """
        self.socket.settimeout(self._silence if timeout is None else timeout)
        while b"\n" not in self._pending:
            received = self.socket.recv(1 << 16)
            if not received:
                raise ConnectionError("the connection was closed")
            self._pending += received
            if len(self._pending) > _LONGEST_LINE:
                raise ValueError("a line that is too long")
        line, _, self._pending = self._pending.partition(b"\n")
        try:
            message = json.loads(line)
        except RecursionError:
            raise ValueError("nested too deep") from None
        if not isinstance(message, dict):
            raise ValueError("not a JSON object")
        return message

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield messages until one of `receive`'s errors."""
        while True:
            yield self.receive()

    @property
    def is_closed(self) -> bool:
        """Whether the other side has closed the connection, as far as can be seen without reading."""
        try:
            return bool(select.select([self.socket], [], [], 0)[0]) and self.socket.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True

    def end(self) -> None:
        """Say that nothing more will be sent."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the connection in both directions."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
