"""Texts over the completions of `gpt2-bundle serve`, whose streams are OpenAI's, for what the slots do elsewhere."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

from serving.clients.rest_transport import CODES, Origin
from serving.clients.tf_serving import Continuation, TFServingClient
from serving.clients.transport import Piece
from serving.errors import ServerError
from serving.sampling import SamplingParams

_PATH = "/v1/completions"
_AT_ONCE = 16
_PROMPTS = 128  # In one request, as the server has it.
_DATA = b"data: "


class Completions:
    """The model that `client` talks to by REST at `url`, by its completions.

    Requests that the server refuses for want of room are sent again as `client` says, whose timeout is, in a stream,
    the longest wait for a piece.
    """

    def __init__(self, client: TFServingClient, url: str, model: str, api_key: str | None = None) -> None:
        self._client, self._url, self._model = client, url, model
        self._origin = Origin(url, api_key)

    def offered(self) -> bool:
        """Whether the server has completions of this model: its status of a model is OpenAI's card too."""

        def ask(left: float) -> bool:
            with self._open("GET", f"/v1/models/{quote(self._model, safe='')}", None, left) as answer:
                card = _object(answer.read())
            return card.get("object") == "model"

        return self._client.attempt(ask)

    def stream(self, prompts: Sequence[str | Sequence[int]], params: SamplingParams) -> Iterator[Piece]:
        """Continue texts or token ids and give each piece as it comes, without token ids. Raises ServerError."""
        for first in range(0, len(prompts), _PROMPTS):
            body = self._body(list(prompts[first : first + _PROMPTS]), params) | {"stream": True}
            with contextlib.ExitStack() as stack:

                def begin(left: float, body: dict[str, Any] = body, stack: contextlib.ExitStack = stack) -> Any:
                    return stack.enter_context(self._open("POST", _PATH, body, left))

                answer = self._client.attempt(begin)
                for event in self._events(answer):
                    for choice in event["choices"]:
                        yield Piece(first + choice["index"], choice["text"], (), choice["finish_reason"])

    def generate(self, prompts: Sequence[str | Sequence[int]], params: SamplingParams) -> list[Continuation]:
        """Continue each text or list of token ids. Raises ServerError."""

        def one(prompt: str | Sequence[int]) -> Continuation:
            def ask(left: float) -> dict[str, Any]:
                with self._open("POST", _PATH, self._body(prompt, params), left) as answer:
                    return _object(answer.read())

            made = self._client.attempt(ask)
            (choice,) = made["choices"]
            return Continuation(choice["text"], made["usage"]["completion_tokens"], choice["finish_reason"])

        with ThreadPoolExecutor(min(_AT_ONCE, len(prompts))) as pool:
            return list(pool.map(one, prompts))

    def _body(self, prompt: Any, params: SamplingParams) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_k": params.top_k,
            "top_p": params.top_p,
            "seed": params.seed,
            "stop": list(params.stop),
            "stop_token_ids": list(params.stop_token_ids),
            "ignore_eos": params.ignore_eos,
        }

    @contextlib.contextmanager
    def _open(self, method: str, path: str, body: Any, timeout: float) -> Iterator[http.client.HTTPResponse]:
        """The answer, of status 200, while the block runs. Raises ServerError, also for what fails in the block."""
        with self._origin.ask(method, path, body, timeout) as answer:
            if answer.status != 200:
                code = CODES.get(answer.status, "INTERNAL")
                error = _object(answer.read()).get("error")
                said = error.get("message") if isinstance(error, dict) else error
                raise ServerError(f"{self._url}: {code}: {said or f'HTTP status {answer.status}'}", code)
            yield answer

    def _events(self, answer: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
        """The data of each event, until the last. Raises ServerError for an error among them, and for a broken end."""
        for line in answer:
            if line.strip() == _DATA + b"[DONE]":
                return
            if line.startswith(_DATA):
                event = _object(line.removeprefix(_DATA))
                if "error" in event:
                    raise ServerError(f"{self._url}: {event['error']['message']}", "INTERNAL")
                yield event
        raise ServerError(f"{self._url}: the stream broke off", "UNAVAILABLE")


def _object(data: bytes) -> dict[str, Any]:
    """JSON as an object; what is none is an empty one."""
    with contextlib.suppress(ValueError):
        value = json.loads(data)
        if isinstance(value, dict):
            return value
    return {}
