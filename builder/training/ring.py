"""All-reduce over TCP: each worker holds a connection to the next one, and sums travel once around the ring.

Each value is added in one place and copied from there, so every worker gets the same bits (Patarasuk and Yuan 2009).
A worker sends 2 (n - 1) / n of the array's bytes.
"""

from __future__ import annotations

import itertools
import select
import socket
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HEADER = struct.Struct("!QQ")
_GREETING = struct.Struct("!8sQ")
_MAGIC = b"gpt2ring"
_POLL_S = 0.5


def greet(right: socket.socket, rank: int) -> None:
    """Tell the next worker who connects to it."""
    right.sendall(_GREETING.pack(_MAGIC, rank))


def greeting(left: socket.socket) -> int:
    """Return the rank of the worker that connected; -1 for another program. Raises OSError if nothing comes."""
    received = b""
    while len(received) < _GREETING.size:
        more = left.recv(_GREETING.size - len(received))
        if not more:
            return -1
        received += more
    magic, rank = _GREETING.unpack(received)
    return int(rank) if magic == _MAGIC else -1


class Ring:
    """Sums arrays over `size` workers.

    Args:
        left, right: connections from the previous and to the next worker.
        rank: of this worker, 0 to `size` - 1.
        check: raises an error when another worker has failed; asked while a sum waits.
    """

    def __init__(
        self, left: socket.socket, right: socket.socket, rank: int, size: int, check: Callable[[], None]
    ) -> None:
        self._left, self._right, self._rank, self._size, self._check = left, right, rank, size, check
        self._operations = 0
        for connection in (left, right):
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def all_reduce(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the sum of every worker's `values`, arrays of one shape and type; all call it in the same order.

        Raises ConnectionError when a neighbor is gone, or sums another array.
        """
        result = np.array(values).reshape(-1)
        self._agree(result.nbytes)
        bounds = [len(result) * part // self._size for part in range(self._size + 1)]
        parts = [result[start:end] for start, end in itertools.pairwise(bounds)]
        received = np.empty(max(map(len, parts)), result.dtype)
        for turn in range(self._size - 1):
            part = parts[(self._rank - turn - 1) % self._size]
            self._exchange(parts[(self._rank - turn) % self._size], received[: len(part)])
            part += received[: len(part)]
        for turn in range(self._size - 1):
            self._exchange(parts[(self._rank - turn + 1) % self._size], parts[(self._rank - turn) % self._size])
        return result.reshape(values.shape)

    def close(self) -> None:
        """End both connections, so that a sum that waits for them fails."""
        for connection in (self._left, self._right):
            connection.close()

    def _agree(self, size: int) -> None:
        """Two programs that are not at the same sum must not add what they send."""
        self._operations += 1
        ours = np.frombuffer(_HEADER.pack(self._operations, size), np.uint8)
        theirs = np.empty_like(ours)
        self._exchange(ours, theirs)
        if (ours != theirs).any():
            raise ConnectionError(f"the workers are not at the same step (sum {self._operations} of {size} bytes)")

    def _exchange(self, out: NDArray[Any], into: NDArray[Any]) -> None:
        """Send one array to the right while the other fills from the left."""
        sending, filling = out.view(np.uint8).data, into.view(np.uint8).data
        while len(sending) or len(filling):
            readable, writable, _ = select.select(
                [self._left] if len(filling) else [], [self._right] if len(sending) else [], [], _POLL_S
            )
            self._check()
            if readable:
                count = self._left.recv_into(filling)
                if not count:
                    raise ConnectionError("the connection was closed")
                filling = filling[count:]
            if writable:
                sending = sending[self._right.send(sending) :]
