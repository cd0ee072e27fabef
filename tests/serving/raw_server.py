"""What a test's own HTTP server, made of a bare socket, does with a request."""

from __future__ import annotations

import re
import socket


def read_request(connection: socket.socket) -> bytes:
    """Read one request with its body, and return its head (b"" after an early end of the connection).

    The body is read to its end: a socket that is closed with bytes unread is reset, and its peer loses the answer.
    """
    data = b""
    while b"\r\n\r\n" not in data and (piece := connection.recv(65536)):
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: *(\d+)", head)
    while length and len(body) < int(length[1]) and (piece := connection.recv(65536)):
        body += piece
    return head
