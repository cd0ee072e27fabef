"""A client of TensorFlow Serving, by REST or gRPC, for a bundle's SavedModel or anyone's.

REST needs the standard library and numpy alone; gRPC needs the extra `client`, which brings TensorFlow.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from tokenizers import Tokenizer

from serving.backends.base import pad_right
from serving.errors import InputError, ServerError
from serving.sampling import SamplingParams

# The server had no room or was not there: the same request may be sent again.
_PASSING = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED"})
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0
_T = TypeVar("_T")


class Transport(Protocol):
    """One protocol to one model. Each call ends within `timeout` seconds or raises ServerError."""

    def predict(self, signature: str, inputs: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Outputs by name as arrays."""

    def metadata(self, timeout: float) -> dict[str, Any]:
        """Signature to {"inputs": {name: {"dtype": "DT_INT32", "shape": [-1]}}, "outputs": ...}; shape may be None."""

    def status(self, timeout: float) -> list[dict[str, Any]]:
        """For each version: `version`, `state` (such as AVAILABLE), `error_code`, `error_message`."""


@dataclass(frozen=True)
class Continuation:
    """A continued text; `finish_reason` is "stop" after the end token, else "length"."""

    text: str
    tokens: int
    finish_reason: str


class TFServingClient:
    """Calls with a deadline each, tried again while the server is busy or away.

    `timeout` is seconds for a call with all its tries, `retries` how many come after the first. Pauses double from
    0.1 s to 2 s and are shortened by a random part, so that clients do not come back all at once.
    """

    def __init__(self, transport: Transport, *, timeout: float = 60.0, retries: int = 4) -> None:
        self._transport, self._timeout, self._retries = transport, timeout, retries
        self._sleep, self._random = time.sleep, random.Random()

    def predict(
        self, inputs: Mapping[str, Any], signature: str = "serving_default", *, idempotent: bool = True
    ) -> dict[str, Any]:
        """Run a signature; returns its outputs by name as arrays, one row a row of the inputs.

        Pass `idempotent` False for a signature that changes the server's state: it is then sent once. Raises
        ServerError with the server's own sentence.
        """
        return self._call(lambda left: self._transport.predict(signature, inputs, left), idempotent)

    def metadata(self) -> dict[str, Any]:
        """The signatures, as `Transport.metadata` gives them."""
        return self._call(self._transport.metadata)

    def status(self) -> list[dict[str, Any]]:
        """The model's versions, as `Transport.status` gives them."""
        return self._call(self._transport.status)

    def generate(
        self, texts: Sequence[str], params: SamplingParams, tokenizer: Tokenizer | None = None
    ) -> list[Continuation]:
        """Continue each text in one request: by `generate_text`, or with `tokenizer` here if the model lacks it.

        Raises InputError for stop texts and ignored end tokens, which the graph does not know, and where neither the
        model nor the caller has a tokenizer.
        """
        if params.stop or params.ignore_eos:
            raise InputError("stop texts and ignore_eos are not done in the server's graph; leave them out")
        rows = len(texts)
        parameters = {
            "max_new_tokens": np.full(rows, params.max_new_tokens, np.int32),
            "temperature": np.full(rows, params.temperature, np.float32),
            "top_k": np.full(rows, params.top_k, np.int32),
            "top_p": np.full(rows, params.top_p, np.float32),
            "seed": np.full(rows, params.seed, np.int64),
        }
        if tokenizer is None or "generate_text" in self.metadata():
            given = np.array([text.encode("utf-8") for text in texts], np.object_)
            outputs = self.predict({"text": given, **parameters}, "generate_text")
            columns = zip(outputs["text"], outputs["lengths"], outputs["finish_reason"], strict=True)
            return [Continuation(_text(text), int(count), _text(reason)) for text, count, reason in columns]
        prompts = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        if not all(prompts):
            raise InputError("a text may not be empty; <|endoftext|> alone starts a new text")
        token_ids, lengths = pad_right(prompts)
        padded = {"token_ids": token_ids.astype(np.int32), "lengths": lengths.astype(np.int32)}
        outputs = self.predict(padded | parameters)
        end = tokenizer.token_to_id("<|endoftext|>")
        made = []
        for row, count in zip(outputs["token_ids"], outputs["lengths"], strict=True):
            ids = [int(token) for token in row[: int(count)]]
            reason = "stop" if ids and ids[-1] == end else "length"
            made.append(Continuation(tokenizer.decode(ids, skip_special_tokens=True), len(ids), reason))
        return made

    def _call(self, send: Callable[[float], _T], idempotent: bool = True) -> _T:
        deadline = time.monotonic() + self._timeout
        pause = _FIRST_PAUSE
        for again in range(self._retries, -1, -1):
            try:
                return send(max(1e-3, deadline - time.monotonic()))
            except ServerError as error:
                wait = pause * (0.5 + self._random.random() / 2)
                if not (again and idempotent and error.code in _PASSING and time.monotonic() + wait < deadline):
                    raise
                self._sleep(wait)
                pause = min(2 * pause, _LONGEST_PAUSE)
        raise AssertionError("the last try returns or raises")


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
