"""HTTP as a client that wants to know when each byte came: one connection a request, timestamps with the data."""

from __future__ import annotations

import json
import ssl
import time
from asyncio import StreamReader, StreamWriter, open_connection
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

from benchmarks.suite.targets.base import TargetError
from serving.errors import InputError, RuntimeMissingError

_BLOCK = 1 << 16
_LONGEST_ERROR = 300


class HttpClient:
    """Requests to the server at `url`, below the path that it has. Raises InputError for what is no address.

    Args:
        headers: sent with every request.
    """

    def __init__(self, url: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise InputError(f"{url!r} is not an address of a server; write http://HOST:PORT")
        self.place, self.path = parts.netloc, parts.path.rstrip("/")
        self._host, self._port = parts.hostname, port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._headers = [("Host", parts.netloc), ("Accept", "*/*"), *headers]

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of an answer. Raises TargetError."""
        data = b"".join([piece async for piece, _ in self.exchange(method, path, body)])
        try:
            return json.loads(data)
        except ValueError:
            raise TargetError(f"{path} does not answer with JSON") from None

    async def events(self, path: str, body: Any) -> AsyncIterator[tuple[dict[str, Any], float]]:
        """Post `body` and give the JSON of each `data:` line of an event stream, with the timestamp of its last bytes.

        Raises TargetError.
        """
        held = b""
        async for data, timestamp in self.exchange("POST", path, body):
            *lines, held = (held + data).split(b"\n")
            for line in lines:
                value = line.strip().removeprefix(b"data:").strip()
                if not line.startswith(b"data:") or value == b"[DONE]":
                    continue
                try:
                    event = json.loads(value)
                except ValueError:
                    event = None
                if not isinstance(event, dict):
                    raise TargetError(f"an event that is not JSON: {shorten(value.decode(errors='replace'))}")
                yield event, timestamp

    async def exchange(self, method: str, path: str, body: Any = None) -> AsyncIterator[tuple[bytes, float]]:
        """Give each piece of the answer's body with the timestamp at which it was read. Raises TargetError."""
        check_h11()
        try:
            reader, writer = await open_connection(self._host, self._port, ssl=self._tls)
        except OSError as error:
            raise TargetError(f"no connection to {self._host}:{self._port} ({error.strerror or error})") from None
        payload = b"" if body is None else json.dumps(body).encode()
        try:
            async for piece in self._converse(reader, writer, method, self.path + path, payload):
                yield piece
        except (OSError, EOFError) as error:
            raise TargetError(f"the connection broke ({error})") from None
        finally:
            writer.close()

    async def _converse(
        self, reader: StreamReader, writer: StreamWriter, method: str, path: str, body: bytes
    ) -> AsyncIterator[tuple[bytes, float]]:
        import h11

        connection = h11.Connection(h11.CLIENT)
        headers = [*self._headers, ("Content-Length", str(len(body))), ("Content-Type", "application/json")]
        head = connection.send(h11.Request(method=method, target=path, headers=headers))
        payload = connection.send(h11.Data(data=body)) if body else b""
        # In one piece: two small writes may wait for each other's acknowledgement.
        writer.write((head or b"") + (payload or b"") + (connection.send(h11.EndOfMessage()) or b""))
        status, refusal, timestamp = 200, b"", time.monotonic()
        try:
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    data = await reader.read(_BLOCK)
                    timestamp = time.monotonic()
                    connection.receive_data(data)
                elif isinstance(event, h11.Response):
                    status = event.status_code
                elif isinstance(event, h11.Data):
                    if status != 200:
                        refusal += bytes(event.data)
                    else:
                        yield bytes(event.data), timestamp
                elif isinstance(event, h11.EndOfMessage):
                    break
        except h11.RemoteProtocolError as error:
            raise TargetError(f"the answer is not HTTP ({error})") from None
        if status != 200:
            raise TargetError(f"HTTP {status}: {shorten(refusal.decode(errors='replace'))}")


def check_h11() -> None:
    """Raise RuntimeMissingError unless h11 is installed."""
    try:
        import h11  # noqa: F401
    except ImportError:
        raise RuntimeMissingError("benchmarks of servers need h11; pip install 'gpt2-bundle[serve]'") from None


def shorten(text: str) -> str:
    """`text` in one line, 300 characters at most."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_ERROR else line[:_LONGEST_ERROR] + " ..."
