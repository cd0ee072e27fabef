"""Any server of OpenAI's completions API, by its event stream."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

from benchmarks.suite.schedule import Planned
from benchmarks.suite.targets.base import Answer, TargetError
from serving.errors import InputError, RuntimeMissingError, ServerError

_BLOCK = 1 << 16
_LONGEST_ERROR = 300


class OpenAITarget:
    """`url` is such as http://127.0.0.1:8000; `/v1/completions` is added. A connection a request.

    Prompts are sent as token ids with `temperature` 0 and, as an extension that many servers know, `ignore_eos`. With
    `stream_options.include_usage` the server says how many tokens it made: where that is not the number of pieces of
    text, each piece has its share of them and the response is marked as not counted. Text is compared, as the
    protocol gives no token ids.

    Args:
        model: its name at the server; the first of `/v1/models` if None.
        api_key: sent as a bearer token.
        process: the server's process id, if it is on this machine.
    """

    precision = None

    def __init__(
        self,
        name: str,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        label: str | None = None,
        stand_in: bool = False,
        process: int | None = None,
    ) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"{url!r} is not an address of a server; write http://HOST:PORT")
        self.name, self.label, self.stand_in = name, label or f"OpenAI API at {parts.netloc}", stand_in
        self._host, self._port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self._model, self._process = model, process
        self._headers = [("Host", parts.netloc), ("Accept", "*/*")]
        if api_key is not None:
            self._headers.append(("Authorization", f"Bearer {api_key}"))

    async def start(self) -> None:
        try:
            import h11  # noqa: F401
        except ImportError:
            raise RuntimeMissingError("benchmarks of servers need h11; pip install 'gpt2-bundle[serve]'") from None
        try:
            body = b"".join([piece async for piece, _ in self._exchange("GET", "/v1/models")])
            models = json.loads(body)["data"]
            self._model = self._model or str(models[0]["id"])
        except TargetError as error:
            raise ServerError(f"{self.name}: {error}", "UNAVAILABLE") from None
        except (ValueError, LookupError, TypeError) as error:
            raise ServerError(
                f"{self.name}: /v1/models does not answer as OpenAI's does ({error})", "INTERNAL"
            ) from None

    async def send(self, request: Planned) -> Answer:
        body = {
            "model": self._model,
            "prompt": list(request.prompt),
            "max_tokens": request.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        pieces: list[str] = []
        times: list[float] = []
        usage: int | None = None
        async for event, moment in _events(self._exchange("POST", "/v1/completions", json.dumps(body).encode())):
            if "error" in event:
                raise TargetError(_shorten(json.dumps(event["error"])))
            if event.get("usage"):
                usage = int(event["usage"]["completion_tokens"])
            text = "".join(choice.get("text") or "" for choice in event.get("choices", ()))
            if text:
                pieces.append(text)
                times.append(moment)
        finished = time.monotonic()
        shared = times if usage is None else share(times, usage, finished)
        return Answer(tuple(shared), finished, counted=len(times) == usage, text="".join(pieces))

    async def stop(self) -> None:
        """Nothing is held between requests."""

    def pid(self) -> int | None:
        return self._process

    async def _exchange(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[tuple[bytes, float]]:
        """Give each piece of the answer's body with the moment at which it was read. Raises TargetError."""
        try:
            reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls)
        except OSError as error:
            raise TargetError(f"no connection to {self._host}:{self._port} ({error.strerror or error})") from None
        try:
            async for piece in self._converse(reader, writer, method, self._base + path, body):
                yield piece
        except (OSError, EOFError) as error:
            raise TargetError(f"the connection broke ({error})") from None
        finally:
            writer.close()

    async def _converse(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str, path: str, body: bytes
    ) -> AsyncIterator[tuple[bytes, float]]:
        import h11

        connection = h11.Connection(h11.CLIENT)
        headers = [*self._headers, ("Content-Length", str(len(body))), ("Content-Type", "application/json")]
        head = connection.send(h11.Request(method=method, target=path, headers=headers))
        payload = connection.send(h11.Data(data=body)) if body else b""
        # In one piece: two small writes may wait for each other's acknowledgement.
        writer.write((head or b"") + (payload or b"") + (connection.send(h11.EndOfMessage()) or b""))
        status, refusal, moment = 200, b"", time.monotonic()
        try:
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    data = await reader.read(_BLOCK)
                    moment = time.monotonic()
                    connection.receive_data(data)
                elif isinstance(event, h11.Response):
                    status = event.status_code
                elif isinstance(event, h11.Data):
                    if status != 200:
                        refusal += bytes(event.data)
                    else:
                        yield bytes(event.data), moment
                elif isinstance(event, h11.EndOfMessage):
                    break
        except h11.RemoteProtocolError as error:
            raise TargetError(f"the answer is not HTTP ({error})") from None
        if status != 200:
            raise TargetError(f"HTTP {status}: {_shorten(refusal.decode(errors='replace'))}")


def share(times: list[float], tokens: int, finished: float) -> list[float]:
    """A moment for each of `tokens` tokens that came in pieces at `times`: equal shares, the first ones the rest.

    Pieces beyond the tokens are the end of a text that was held back, and are no tokens. Tokens that made no text at
    all have come at the end.
    """
    if not times:
        return [finished] * tokens
    if tokens <= len(times):
        return times[:tokens]
    each, more = divmod(tokens, len(times))
    return [moment for place, moment in enumerate(times) for _ in range(each + (place < more))]


async def _events(body: AsyncIterator[tuple[bytes, float]]) -> AsyncIterator[tuple[dict[str, Any], float]]:
    """The JSON of each `data:` line of a text/event-stream, with the moment of the bytes that ended it."""
    held = b""
    async for data, moment in body:
        *lines, held = (held + data).split(b"\n")
        for line in lines:
            value = line.strip().removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or value == b"[DONE]":
                continue
            try:
                event = json.loads(value)
            except ValueError:
                raise TargetError(f"an event that is not JSON: {_shorten(value.decode(errors='replace'))}") from None
            yield event, moment


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_ERROR else line[:_LONGEST_ERROR] + " ..."
