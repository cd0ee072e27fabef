"""Any server of OpenAI's completions API, by its event stream."""

from __future__ import annotations

import json
import time
from typing import Any

from benchmarks.suite.load.schedule import Planned
from benchmarks.suite.targets.base import Completion, Target, TargetError, share
from benchmarks.suite.targets.http import HttpClient, shorten
from serving.errors import ServerError


class OpenAITarget(Target):
    """`url` is such as http://127.0.0.1:8000; `/v1/completions` is added. A connection a request.

    Prompts are sent as token ids with `temperature` 0 and, as an extension that many servers know, `ignore_eos`. With
    `stream_options.include_usage` the server says how many tokens it made: where that is not the number of pieces of
    text, each piece has its share of them and the response is marked as not counted. Text is compared, as the
    protocol gives no token ids, but where the server is asked for them.

    Args:
        model: its name at the server; the first of `/v1/models` if None.
        api_key: sent as a bearer token.
        ids: ask for token ids by `return_token_ids`, which our server knows: tokens without a text come then too.
        about: `precision`, `emulator` and `process` of `Target`.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        label: str | None = None,
        ids: bool = False,
        **about: Any,
    ) -> None:
        self._http = HttpClient(url, (("Authorization", f"Bearer {api_key}"),) if api_key is not None else ())
        self._http.path = self._http.path.removesuffix("/v1")
        super().__init__(name, label or f"OpenAI API at {self._http.place}", **about)
        self._model, self._ids = model, ids

    async def start(self) -> None:
        try:
            models = (await self._http.ask("GET", "/v1/models"))["data"]
            self._model = self._model or str(models[0]["id"])
        except TargetError as error:
            raise ServerError(f"{self.name}: {error}", "UNAVAILABLE") from None
        except (LookupError, TypeError) as error:
            raise ServerError(
                f"{self.name}: /v1/models does not answer as OpenAI's does ({error})", "INTERNAL"
            ) from None

    async def send(self, request: Planned) -> Completion:
        body = {
            "model": self._model,
            "prompt": list(request.prompt),
            "max_tokens": request.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        } | ({"return_token_ids": True} if self._ids else {})  # fmt: skip
        pieces: list[str] = []
        tokens: list[int] = []
        times: list[float] = []
        usage: int | None = None
        async for event, timestamp in self._http.events("/v1/completions", body):
            if "error" in event:
                raise TargetError(shorten(json.dumps(event["error"])))
            if event.get("usage"):
                usage = int(event["usage"]["completion_tokens"])
            choices = event.get("choices", ())
            made = [token for choice in choices for token in choice.get("token_ids") or ()]
            text = "".join(choice.get("text") or "" for choice in choices)
            pieces.append(text)
            tokens += made
            times += [timestamp] * (len(made) if self._ids else bool(text))
        finished = time.monotonic()
        shared = times if usage is None else share(times, usage, finished)
        known = tuple(tokens) if self._ids else None
        return Completion(tuple(shared), finished, counted=len(times) == usage, tokens=known, text="".join(pieces))
