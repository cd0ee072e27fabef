"""Servers of the generate extension of the Open Inference Protocol, as KServe and Triton have it: text in, text out."""

from __future__ import annotations

import json
import time
from typing import Any

from tokenizers import Tokenizer

from benchmarks.suite.load.schedule import Planned
from benchmarks.suite.targets.base import Completion, Pieces, Target, TargetError
from benchmarks.suite.targets.http import HttpClient, shorten
from serving.bundle import Bundle
from serving.errors import InputError, ServerError
from serving.sampling.detokenizer import load_tokenizer


class GenerateTarget(Target):
    """`URL/v2/models/MODEL/generate_stream`, whose events have the new text in `text_output`.

    Prompts are sent as text, which a server may cut into other tokens. An event counts as one token unless the server
    says how many it holds (`num_output_tokens`, or `lengths` next to `token_ids` as our own does). Where it names no
    number and the events are not as many as the tokens asked for, they share these if it says that it ended by length,
    and the response is marked as not counted. Text is compared where a server gives no token ids.

    Args:
        model: its name at the server; by Triton's repository index, which must then hold one that is ready, if None.
        about: `precision`, `emulator` and `process` of `Target`.
    """

    def __init__(self, name: str, server: str, url: str, bundle: Bundle, *, model: str | None, **about: Any) -> None:
        self._http = HttpClient(url)
        super().__init__(name, f"{server} at {self._http.place}, by generate_stream", **about)
        self._bundle, self._model = bundle, model

    async def start(self) -> None:
        self._tokenizer = load_tokenizer(self._bundle)
        try:
            if self._model is None:
                self._model = self._only(await self._http.ask("POST", "/v2/repository/index", {}))
            await self._http.ask("GET", f"/v2/models/{self._model}")
        except TargetError as error:
            raise ServerError(f"{self.name}: {error}", "UNAVAILABLE") from None

    async def send(self, request: Planned) -> Completion:
        parameters = {"stream": True, "max_tokens": request.new_tokens, "temperature": 0, "ignore_eos": True}
        # What Triton's backends know too; others do not look at it.
        parameters |= dict.fromkeys(
            ("exclude_input_in_output", "return_finish_reason", "return_num_output_tokens"), True
        )
        body = {"text_input": sent_text(self._tokenizer, request), "parameters": parameters}
        pieces, reason = Pieces(), None
        async for event, timestamp in self._http.events(f"/v2/models/{self._model}/generate_stream", body):
            if "error" in event:
                raise TargetError(shorten(json.dumps(event["error"])))
            # KServe's `details.finish_reason`, or an output of that name; nothing before the end.
            details = event.get("details")
            found = (details if isinstance(details, dict) else event).get("finish_reason")
            reason = reason if found in (None, "", "None") else str(found)
            number = event.get("num_output_tokens", event.get("lengths"))
            text = str(event.get("text_output") or "")
            pieces.add(timestamp, text, number if isinstance(number, int) else None, event.get("token_ids") or [])
        return pieces.completion(reason, request.new_tokens, time.monotonic())

    def _only(self, index: Any) -> str:
        try:
            ready = [str(each["name"]) for each in index if each.get("state", "READY") == "READY"]
        except (TypeError, KeyError, AttributeError):
            raise TargetError("/v2/repository/index does not answer as Triton's does") from None
        if len(ready) != 1:
            found = ", ".join(ready) or "none"
            raise InputError(f"{self.name}: the server has not one model but {found}; name one, as URL/MODEL")
        return ready[0]


def sent_text(tokenizer: Tokenizer, request: Planned) -> str:
    """A prompt as text."""
    text: str = tokenizer.decode(list(request.prompt), skip_special_tokens=False)
    return text


def split_model(address: str) -> tuple[str, str | None]:
    """An address and the model's name in its path: "http://host:8000/gpt2" is ("http://host:8000", "gpt2")."""
    scheme, separator, rest = address.rpartition("://")
    place, _, model = rest.rstrip("/").partition("/")
    return f"{scheme}{separator}{place}", model or None
