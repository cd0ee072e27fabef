"""TensorFlow Serving's REST API (tensorflow/serving, docs/api_rest.md), by the standard library."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal
from urllib.parse import quote, urlsplit

import numpy as np

from serving.clients.wrong_answers import MAX_ANSWER, reading
from serving.errors import InputError, ServerError, cut

CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    409: "ABORTED",
    412: "FAILED_PRECONDITION",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    501: "UNIMPLEMENTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


class Origin:
    """A server that `url` names, such as http://127.0.0.1:8501, and the API key that it is given, if any.

    Raises InputError for what is not an address of a server, and for a key that no header can hold.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise InputError(f"{url!r} is not an address of a server; write it as http://127.0.0.1:8501")
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._url, self._host, self._port, self._path = url, parts.hostname, port, parts.path.rstrip("/")
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = bearer(api_key)

    @contextlib.contextmanager
    def ask(self, method: str, path: str, body: Any, timeout: float) -> Iterator[http.client.HTTPResponse]:
        """Send `body` as JSON, or nothing where it is None; the answer, whatever its status, while the block runs.

        The answer's head is waited for `timeout` seconds in all, and each read of the rest as long. Raises ServerError
        where no answer comes, or TimeoutError, OSError or HTTPException is raised in the block.
        """
        data = None if body is None else json.dumps(body).encode("utf-8")
        connection = self._kind(self._host, self._port, timeout=timeout)
        late = threading.Event()
        # A head that comes byte by byte keeps each read short of its own limit.
        timer = threading.Timer(timeout, _break_off, (connection, late))
        timer.daemon = True
        timer.start()
        try:
            connection.request(method, self._path + path, data, self._headers)
            answer = connection.getresponse()
            timer.cancel()
            if late.is_set():
                raise TimeoutError
            yield answer
        except TimeoutError:
            raise ServerError(f"{self._url}: no answer within the deadline", "DEADLINE_EXCEEDED") from None
        except (OSError, http.client.HTTPException) as error:
            if late.is_set():
                raise ServerError(f"{self._url}: no answer within the deadline", "DEADLINE_EXCEEDED") from None
            # What came in the place of a status line may be any bytes, such as gRPC's.
            strange = type(error) is http.client.BadStatusLine
            why = "the answer is not HTTP" if strange else f"{cut(str(error)) or type(error).__name__}; is it running?"
            raise ServerError(f"{self._url}: {why}", "UNAVAILABLE") from None
        finally:
            timer.cancel()
            connection.close()


def _break_off(connection: http.client.HTTPConnection, late: threading.Event) -> None:
    late.set()
    if connection.sock is not None:
        with contextlib.suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)


def bearer(api_key: str) -> str:
    """The value of the header Authorization. Raises InputError for what no header can hold."""
    if not api_key or not api_key.isascii() or not api_key.isprintable():
        raise InputError("the API key must be printable ASCII characters")
    return f"Bearer {api_key}"


class RestTransport:
    """One model below `url`, such as http://127.0.0.1:8501; `layout` "row" sends instances, "column" inputs."""

    def __init__(
        self, url: str, model: str, layout: Literal["row", "column"] = "column", api_key: str | None = None
    ) -> None:
        self._origin, self._layout = Origin(url, api_key), layout
        self._url, self._path = url, f"/v1/models/{quote(model, safe='')}"

    def predict(self, signature: str, inputs: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        columns = {name: _plain(value) for name, value in inputs.items()}
        if self._layout == "column":
            body: dict[str, Any] = {"inputs": columns}
        else:
            rows = zip(*columns.values(), strict=True)
            body = {"instances": [dict(zip(columns, row, strict=True)) for row in rows]}
        deadline = time.monotonic() + timeout
        answer = self._ask("POST", ":predict", {"signature_name": signature, **body}, timeout)
        outputs = answer.get("outputs", answer.get("predictions"))
        with reading(self._url, _PROTOCOL):
            if isinstance(outputs, dict):
                return {name: _array(value) for name, value in outputs.items()}
            if isinstance(outputs, list) and outputs and isinstance(outputs[0], dict) and set(outputs[0]) != {"b64"}:
                return {name: _array([row[name] for row in outputs]) for name in outputs[0]}
            # A single output comes without its name.
            names = list(self.metadata(max(1e-3, deadline - time.monotonic()))[signature]["outputs"])
            return {names[0]: _array(outputs)}

    def metadata(self, timeout: float) -> dict[str, Any]:
        answer = self._ask("GET", "/metadata", None, timeout)
        with reading(self._url, _PROTOCOL):
            signatures = answer["metadata"]["signature_def"]["signature_def"]
            return {
                name: {side: {key: _spec(info) for key, info in definition.get(side, {}).items()} for side in _SIDES}
                for name, definition in sorted(signatures.items())
                if not name.startswith("__")
            }

    def status(self, timeout: float) -> list[dict[str, Any]]:
        answer = self._ask("GET", "", None, timeout)
        with reading(self._url, _PROTOCOL):
            return [
                {
                    "version": int(each["version"]),
                    "state": cut(str(each["state"])),
                    "error_code": cut(str(each.get("status", {}).get("error_code", "OK"))),
                    "error_message": cut(str(each.get("status", {}).get("error_message", "")), 400),
                }
                for each in answer["model_version_status"]
            ]

    def _ask(self, method: str, suffix: str, body: Any, timeout: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        parts, size = [], 0
        with self._origin.ask(method, self._path + suffix, body, timeout) as response:
            while part := response.read1(1 << 16):
                if time.monotonic() > deadline:
                    raise TimeoutError
                parts.append(part)
                size += len(part)
                if size > MAX_ANSWER:
                    raise ServerError(f"{self._url}: its answer is too long; ask for fewer rows", "INTERNAL")
        try:
            answer = json.loads(b"".join(parts))
        except (ValueError, RecursionError):
            answer = None
        if response.status != 200:
            code = CODES.get(response.status, "INTERNAL")
            said = answer.get("error") if isinstance(answer, dict) else None
            if isinstance(said, dict):  # OpenAI's form, of 'gpt2-bundle serve' for what no model answers.
                said = said.get("message")
            said = cut(str(said), 400) if said else f"HTTP status {response.status}"
            raise ServerError(f"{self._url}: {code}: {said}", code)
        if not isinstance(answer, dict):
            raise ServerError(f"{self._url}: the answer is not JSON; is this TensorFlow Serving?", "INTERNAL")
        return answer


_SIDES = ("inputs", "outputs")
_PROTOCOL = "TensorFlow Serving's REST API"


def _spec(info: dict[str, Any]) -> dict[str, Any]:
    shape = info["tensor_shape"]
    sizes = None if shape.get("unknown_rank") else [int(dim["size"]) for dim in shape.get("dim", [])]
    return {"dtype": str(info["dtype"]), "shape": sizes}


def _plain(value: Any) -> Any:
    """Lists and numbers; bytes as {"b64": ...}, so that any bytes arrive as they are."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return {"b64": base64.b64encode(value).decode("ascii")} if isinstance(value, bytes) else value


def _array(value: Any) -> Any:
    """An array; of objects, str or bytes, where the server sent text."""

    def bare(each: Any) -> Any:
        if isinstance(each, list):
            return [bare(one) for one in each]
        return base64.b64decode(each["b64"]) if isinstance(each, dict) else each

    plain = np.array(bare(value))
    return plain if plain.dtype.kind in "biuf" else np.array(bare(value), np.object_)
