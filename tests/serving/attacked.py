"""A server as a process of its own under a limit of memory, attacked while a client reads a stream from it."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.closed_form import write_bundle

MEMORY = 2_500_000
"""KiB of address space."""


@dataclass
class Attacked:
    """A server at `port` of loopback, its process and the file that its log goes to."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def connect(self, timeout: float = 60) -> socket.socket:
        """A connection to it."""
        return socket.create_connection(("127.0.0.1", self.port), timeout)

    def send(self, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> socket.socket:
        """A connection on which `body` was posted, packed; its answer is not read."""
        packed = gzip.compress(body)
        fields = {
            "Host": "x",
            "Content-Type": "application/json",
            "Content-Encoding": "gzip",
            "Content-Length": str(len(packed)),
            "Connection": "close",
            **(headers or {}),
        }
        connection = self.connect()
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        connection.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + packed)
        return connection

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """The answer's status and body."""
        with self.send(path, body) as connection:
            return read_answer(connection)

    def processor(self) -> float:
        """Seconds of processors that the process has had, which do not depend on what else the machine does."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident(self) -> int:
        """Bytes of memory that the process holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))

    @contextlib.contextmanager
    def watched(self) -> Iterator[Pulse]:
        """A stream that is read while the block runs."""
        pulse = Pulse(self)
        try:
            yield pulse
        finally:
            pulse.stop()


class Pulse:
    """A stream under way; `worst` is the longest time in seconds between two of its reads."""

    def __init__(self, server: Attacked) -> None:
        body = json.dumps({"prompt": [1], "max_tokens": 1000, "ignore_eos": True, "stream": True}).encode()
        self._connection = server.send("/v1/completions", body)
        self._connection.recv(4096)
        self.worst, self._last, self._stopped = 0.0, time.monotonic(), False
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while not self._stopped and self._connection.recv(65536):
            now = time.monotonic()
            self.worst, self._last = max(self.worst, now - self._last), now

    def stop(self) -> None:
        """Read no more. A stream that had stopped counts until now."""
        self._stopped = True
        self._thread.join(60)
        self._connection.close()


def read_answer(connection: socket.socket) -> tuple[int, bytes]:
    """Status and body of an answer that ends with its connection."""
    data = b""
    while piece := connection.recv(65536):
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


@contextlib.contextmanager
def attacked(folder: Path, pace: float = 0.01, **settings: Any) -> Iterator[Attacked]:
    """A server of doubles with all protocols while the block runs."""
    write_bundle(folder / "tiny")
    program = f'ulimit -v {MEMORY}; exec {sys.executable} -m tests.serving.serve_attacked {folder}/tiny {pace} "$0"'
    log = folder / "log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            ["bash", "-c", program, json.dumps(settings)], stdout=subprocess.PIPE, stderr=errors, bufsize=0
        )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().decode()
        assert url, log.read_text()
        yield Attacked(int(url.rpartition(":")[2]), process, log)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
