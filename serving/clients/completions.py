"""Texts over the completions of `gpt2-bundle serve`, whose streams are OpenAI's, for what the slots do elsewhere."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

from serving.clients.rest_transport import CODES, Origin
from serving.clients.tf_serving import Continuation, TFServingClient
from serving.clients.transport import Piece
from serving.errors import ServerError, cut
from serving.sampling import DECLARATIONS, SamplingParams

_PATH = "/v1/completions"
_AT_ONCE = 16
_PROMPTS = 128  # In one request, as the server has it.
_DATA = b"data: "
_PIECE = 65_536
_MAX_LINE = 4 << 20
"""Bytes of one event."""
_MAX_ANSWER = 64 << 20


class Completions:
    """The model that `client` talks to by REST at `url`, by its completions.

    Requests that the server refuses for want of room are sent again as `client` says, whose timeout is, in a stream,
    the longest wait for new text.
    """

    def __init__(self, client: TFServingClient, url: str, model: str, api_key: str | None = None) -> None:
        self._client, self._url, self._model = client, url, model
        self._origin = Origin(url, api_key)

    def offered(self) -> bool:
        """Whether the server has completions of this model: its status of a model is OpenAI's card too."""

        def ask(left: float) -> bool:
            with self._open("GET", f"/v1/models/{quote(self._model, safe='')}", None, left) as answer:
                card = _object(self._read(answer, left))
            return card.get("object") == "model"

        return self._client.attempt(ask)

    def stream(self, prompts: Sequence[str | Sequence[int]], params: SamplingParams) -> Iterator[Piece]:
        """Continue texts or token ids and yield the text as it arrives, without token ids. Raises ServerError."""
        for first in range(0, len(prompts), _PROMPTS):
            body = self._body(list(prompts[first : first + _PROMPTS]), params) | {"stream": True}
            with contextlib.ExitStack() as stack:

                def begin(left: float, body: dict[str, Any] = body, stack: contextlib.ExitStack = stack) -> Any:
                    return stack.enter_context(self._open("POST", _PATH, body, left))

                answer = self._client.attempt(begin)
                count = len(body["prompt"])
                for event in self._events(answer):
                    for index, text, reason in self._choices(event, count):
                        yield Piece(first + index, text, (), reason)

    def generate(self, prompts: Sequence[str | Sequence[int]], params: SamplingParams) -> list[Continuation]:
        """Continue each text or list of token ids. Raises ServerError."""

        def one(prompt: str | Sequence[int]) -> Continuation:
            def ask(left: float) -> dict[str, Any]:
                with self._open("POST", _PATH, self._body(prompt, params), left) as answer:
                    return _object(self._read(answer, left))

            made = self._client.attempt(ask)
            choices, usage = self._choices(made, 1), made.get("usage")
            tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
            if len(choices) != 1 or type(tokens) is not int or choices[0][2] is None:
                raise self._strange("its answer is not a completion")
            ((_, text, reason),) = choices
            return Continuation(text, tokens, reason)

        with ThreadPoolExecutor(min(_AT_ONCE, len(prompts))) as pool:
            return list(pool.map(one, prompts))

    def _body(self, prompt: Any, params: SamplingParams) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": prompt,
            **{each.wire: getattr(params, each.name) for each in DECLARATIONS.values() if each.slots},
            "stop": list(params.stop),
            "stop_token_ids": list(params.stop_token_ids),
        }

    @contextlib.contextmanager
    def _open(self, method: str, path: str, body: Any, timeout: float) -> Iterator[http.client.HTTPResponse]:
        """The answer, of status 200, while the block runs. Raises ServerError, also for what fails in the block."""
        with self._origin.ask(method, path, body, timeout) as answer:
            if answer.status != 200:
                code = CODES.get(answer.status, "INTERNAL")
                error = _object(self._read(answer, timeout)).get("error")
                said = error.get("message") if isinstance(error, dict) else error
                said = cut(str(said), 400) if said else None
                raise ServerError(f"{self._url}: {code}: {said or f'HTTP status {answer.status}'}", code)
            yield answer

    def _events(self, answer: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
        """The data of each event, until the last. Raises ServerError for an error among them, and for a broken end."""
        for line in self._lines(answer):
            if line.strip() == _DATA + b"[DONE]":
                return
            if line.startswith(_DATA):
                event = _object(line.removeprefix(_DATA))
                error = event.get("error")
                if error is not None:
                    said = error.get("message") if isinstance(error, dict) else error
                    raise ServerError(f"{self._url}: {cut(str(said), 400)}", "INTERNAL")
                yield event
        raise ServerError(f"{self._url}: the stream broke off", "UNAVAILABLE")

    def _choices(self, event: dict[str, Any], prompts: int) -> list[tuple[int, str, Any]]:
        """Prompt, text and finish reason of each choice. Raises ServerError for any other answer."""
        found = []
        choices = event.get("choices")
        for choice in choices if isinstance(choices, list) else [None]:
            values = choice if isinstance(choice, dict) else {}
            index, text, reason = values.get("index"), values.get("text"), values.get("finish_reason")
            if type(index) is not int or not 0 <= index < prompts or not isinstance(text, str):
                raise self._strange("its answer has a choice that is none")
            if reason not in (None, "stop", "length"):
                raise self._strange("its answer has a finish_reason that is none")
            found.append((index, text, reason))
        return found

    def _read(self, answer: http.client.HTTPResponse, seconds: float) -> bytes:
        """All of a body. Raises ServerError if it is too long, or not there after `seconds`, however it trickles."""
        return b"".join(self._pieces(answer, seconds, _MAX_ANSWER))

    def _lines(self, answer: http.client.HTTPResponse) -> Iterator[bytes]:
        """The lines of a body. Raises ServerError for one that is too long, or takes longer than the client waits."""
        rest = b""
        while True:
            for piece in self._pieces(answer, self._client.timeout, _MAX_LINE - len(rest)):
                rest += piece
                if b"\n" in piece:
                    break
            else:
                break
            *lines, rest = rest.split(b"\n")
            yield from lines
        if rest:
            yield rest

    def _pieces(self, answer: http.client.HTTPResponse, seconds: float, most: int) -> Iterator[bytes]:
        deadline = time.monotonic() + seconds
        while piece := answer.read1(_PIECE):
            most -= len(piece)
            if most < 0:
                raise self._strange("its answer is too long")
            if time.monotonic() > deadline:
                raise ServerError(f"{self._url}: no answer within the deadline", "DEADLINE_EXCEEDED")
            yield piece

    def _strange(self, problem: str) -> ServerError:
        return ServerError(f"{self._url}: {problem}; is it 'gpt2-bundle serve'?", "INTERNAL")


def _object(data: bytes) -> dict[str, Any]:
    """JSON as an object; what is none is an empty one."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(data)
        if isinstance(value, dict):
            return value
    return {}
