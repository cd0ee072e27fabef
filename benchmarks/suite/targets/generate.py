"""Servers of the generate extension of the Open Inference Protocol, as KServe and Triton have it: text in, text out."""

from __future__ import annotations

import json
import time
from typing import Any

from tokenizers import Tokenizer

from benchmarks.suite.load.schedule import Planned
from benchmarks.suite.targets.base import Completion, TargetError
from benchmarks.suite.targets.http import HttpClient, share, shorten
from serving.bundle import Bundle
from serving.errors import InputError, ServerError
from serving.sampling.detokenizer import load_tokenizer


class GenerateTarget:
    """`URL/v2/models/MODEL/generate_stream`, whose events have the new text in `text_output`.

    Prompts are sent as text, which a server may cut into other tokens. An event counts as one token unless the server
    says how many it holds (`num_output_tokens`, or `lengths` next to `token_ids` as our own does). Where it names no
    number and the events are not as many as the tokens asked for, they share these if it says that it ended by length,
    and the response is marked as not counted. Text is compared where a server gives no token ids.

    Args:
        model: its name at the server; by Triton's repository index, which must then hold one that is ready, if None.
        process: the server's process id, if it is on this machine.
    """

    precision: str | None = None

    def __init__(
        self,
        name: str,
        server: str,
        url: str,
        bundle: Bundle,
        *,
        model: str | None,
        emulator: bool = False,
        process: int | None = None,
    ) -> None:
        self._http = HttpClient(url)
        self.name, self.label = name, f"{server} at {self._http.place}, by generate_stream"
        self.emulator, self._process = emulator, process
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
        body = {
            "text_input": sent_text(self._tokenizer, request),
            "parameters": {
                "stream": True,
                "max_tokens": request.new_tokens,
                "temperature": 0,
                "ignore_eos": True,
                # What Triton's backends know too; others do not look at it.
                "exclude_input_in_output": True,
                "return_finish_reason": True,
                "return_num_output_tokens": True,
            },
        }
        pieces: list[str] = []
        times: list[float] = []
        numbers: list[int] = []
        tokens: list[int] = []
        reason = None
        async for event, timestamp in self._http.events(f"/v2/models/{self._model}/generate_stream", body):
            if "error" in event:
                raise TargetError(shorten(json.dumps(event["error"])))
            reason = finish_reason(event) or reason
            text, number = event.get("text_output"), event.get("num_output_tokens", event.get("lengths"))
            if text or number:
                pieces.append(str(text or ""))
                times.append(timestamp)
                numbers += [number] if isinstance(number, int) else []
                tokens += event.get("token_ids") or ()
        finished = time.monotonic()
        timestamps, counted = timestamps_of(times, numbers, reason, request.new_tokens, finished)
        known = tuple(tokens) if len(tokens) == len(timestamps) else None
        return Completion(tuple(timestamps), finished, counted=counted, tokens=known, text="".join(pieces))

    async def stop(self) -> None:
        """Nothing is held between requests."""

    def pid(self) -> int | None:
        return self._process

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


def finish_reason(event: dict[str, Any]) -> str | None:
    """Why a text ended: KServe's `details.finish_reason`, or an output of that name; None before its end."""
    details = event.get("details")
    found = details.get("finish_reason") if isinstance(details, dict) else event.get("finish_reason")
    return str(found) if found not in (None, "", "None") else None


def timestamps_of(
    times: list[float], numbers: list[int], reason: str | None, asked: int, finished: float
) -> tuple[list[float], bool]:
    """A timestamp for each token of an answer in pieces at `times`, and whether the server told their number.

    `numbers` are the tokens of each piece where the server says them.
    """
    if len(numbers) == len(times) and numbers:
        return [timestamp for timestamp, number in zip(times, numbers, strict=True) for _ in range(number)], True
    if len(times) == asked:
        return times, True
    # Half a character makes no text, so that pieces may be fewer than tokens; that all were made the server must say.
    return (share(times, asked, finished), False) if reason == "length" else (times, False)


def split_model(address: str) -> tuple[str, str | None]:
    """An address and the model's name in its path: "http://host:8000/gpt2" is ("http://host:8000", "gpt2")."""
    scheme, separator, rest = address.rpartition("://")
    place, _, model = rest.rstrip("/").partition("/")
    return f"{scheme}{separator}{place}", model or None
