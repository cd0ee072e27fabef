"""A client of TensorFlow Serving, by REST or gRPC, for a bundle's SavedModel or anyone's.

REST needs the standard library and numpy alone; gRPC needs the extra `client`.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer

from serving.backends.base import pad_right
from serving.clients.outliving_calls import CALL_SECONDS, CallGoesOnError, OutlivingCalls
from serving.clients.predict_stream import StreamedTexts, sampling_inputs
from serving.clients.request_checks import check_inputs
from serving.clients.slot_pool import SIGNATURES, check_graph_params
from serving.clients.slot_stream import SlotTexts
from serving.clients.transport import EMPTY_PROMPT, Piece, Transport, as_text
from serving.clients.wrong_answers import check_outputs
from serving.errors import InputError, ServerError
from serving.sampling import SamplingParams

# The server had no room or was not there, or dropped the request with others that it was merged with: the same request
# may be sent again.
_PASSING = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED"})
# Or its answer was lost, where the request changes nothing or says by itself what it wants.
_LOST = _PASSING | {"DEADLINE_EXCEEDED"}
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0
# Tokens of a call whose text is not streamed.
_STEPS = 8
# One row of the other inputs of `serving_default`.
_ONE_GREEDY = (
    ("lengths", 1, np.int32),
    ("temperature", 0.0, np.float32),
    ("top_k", 0, np.int32),
    ("top_p", 1.0, np.float32),
    ("seed", 0, np.int64),
)
_T = TypeVar("_T")


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

    def __init__(
        self, transport: Transport, *, timeout: float = 60.0, retries: int = 4, eos_token_id: int | None = None
    ) -> None:
        """Without `eos_token_id`, the token that ends a text, the server is asked for it where it is needed."""
        self._transport, self.timeout, self._retries = transport, timeout, retries
        self._eos, self._signatures = eos_token_id, dict[str, Any]()
        self.sleep: Callable[[float], None] = time.sleep
        self._random = random.Random()

    def predict(
        self, inputs: Mapping[str, Any], signature: str = "serving_default", *, idempotent: bool = True
    ) -> dict[str, Any]:
        """Run a signature; returns its outputs by name as arrays, one row a row of the inputs.

        Pass `idempotent` False for a signature that changes the server's state: it is then sent once. Raises
        InputError for no rows, unequal ones and a rank that is not the signature's, and ServerError with the server's
        own sentence.
        """
        if not self._signatures:
            self._signatures = self.metadata()
        specs = self._signatures.get(signature, {})
        check_inputs(inputs, specs.get("inputs", {}))
        codes = _PASSING if idempotent else frozenset()
        outputs = self.attempt(lambda left: self._transport.predict(signature, inputs, left), codes)
        check_outputs(outputs, specs.get("outputs", {}), max((len(value) for value in inputs.values()), default=0))
        return outputs

    def repeat(
        self,
        signature: str,
        inputs: Mapping[str, Any],
        timeout: float | None = None,
        late: Callable[[dict[str, Any] | None], None] | None = None,
    ) -> dict[str, Any]:
        """Run a signature that may be run again with the same inputs, as those of slots may.

        It is sent again after an answer was lost too: each try but the last is waited for half of the time that is
        left. `timeout` replaces the client's. A try that is no longer waited for is not cancelled, since it shares its
        work with those of others: it ends by itself, and `late` is given its outputs, or None for its error. Raises
        CallGoesOnError where the caller's patience ends first.
        """
        seconds = max(CALL_SECONDS, self.timeout)
        calls = OutlivingCalls(lambda: self._transport.predict(signature, inputs, seconds), late)

        def wait(left: float) -> dict[str, Any]:
            calls.start()
            try:
                return calls.wait(left)
            except TimeoutError:
                raise CallGoesOnError(self.timeout if timeout is None else timeout) from None

        try:
            return self.attempt(wait, _LOST, timeout)
        finally:
            calls.leave()

    def end_token(self) -> int:
        """The token that ends a text: as given, or as the server pads rows with it."""
        if self._eos is None:
            self._eos = self._ask_end_token()
        return self._eos

    def _ask_end_token(self) -> int:
        if "tokenize" in self.metadata():
            outputs = self.predict({"text": np.array([b"a", b"a a a"], np.object_)}, "tokenize")
        else:
            rows = {name: np.array([value] * 2, kind) for name, value, kind in _ONE_GREEDY}
            rows |= {"token_ids": np.zeros([2, 1], np.int32), "max_new_tokens": np.array([1, 2], np.int32)}
            outputs = self.predict(rows)
        token_ids, lengths = np.asarray(outputs["token_ids"]), np.asarray(outputs["lengths"])
        if lengths[0] < token_ids.shape[1]:
            return int(token_ids[0][lengths[0]])
        # The row that may be longer is not: it ended early, at its end token.
        return int(token_ids[1][lengths[1] - 1])

    def jitter(self, pause: float) -> float:
        """`pause` shortened by a random part of at most a half."""
        return pause * (0.5 + self._random.random() / 2)

    def metadata(self) -> dict[str, Any]:
        """The signatures, as `Transport.metadata` gives them."""
        return self.attempt(self._transport.metadata)

    def status(self) -> list[dict[str, Any]]:
        """The model's versions, as `Transport.status` gives them."""
        return self.attempt(self._transport.status)

    def stream(
        self,
        prompts: Sequence[str | Sequence[int]] | str,
        params: SamplingParams,
        tokenizer: Tokenizer | None = None,
        *,
        steps: int = 1,
    ) -> Iterator[Piece]:
        """Continue texts or token ids over the server's slots and yield the text as it arrives, `steps` tokens a call.

        Any number of prompts advance together, as many at once as there are slots. With `tokenizer` text is made here,
        else by the server's `tokenize` and `detokenize`, one more call a token. Stop texts and stop token ids end a
        text here; `ignore_eos` works at temperature 0. Closing the iterator gives the slots back. Raises InputError
        at once for what slots cannot do; ServerError as `SlotTexts.run` says.
        """
        given = [prompts] if isinstance(prompts, str) else prompts
        return SlotTexts(self, tokenizer).run(given, params, steps=steps)

    def predict_stream(
        self, prompts: Sequence[str | Sequence[int]] | str, params: SamplingParams, tokenizer: Tokenizer | None = None
    ) -> Iterator[Piece]:
        """Continue texts or token ids by PredictStreamed and yield the text as it arrives.

        For a server without slots, such as `gpt2-bundle serve`: TensorFlow Serving gives the whole answer at once. The
        client's timeout is the longest wait for new text. Closing the iterator ends the call. Raises InputError at once
        for what the graph does not know, and ServerError, UNIMPLEMENTED where the server has no such call.
        """
        given = [prompts] if isinstance(prompts, str) else prompts
        return StreamedTexts(self._open_stream, self.end_token, tokenizer).run(given, params)

    def _open_stream(self, signature: str, inputs: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The increments of PredictStreamed, asked for again until the first is there."""
        streamed = getattr(self._transport, "predict_streamed", None)
        if streamed is None:
            raise ServerError("PredictStreamed is a call of gRPC alone", "UNIMPLEMENTED")

        def begin(left: float) -> Generator[dict[str, Any], None, None]:
            increments = streamed(signature, inputs, self.timeout)
            return _put_before(next(increments, None), increments)

        return self.attempt(begin)

    def has_slots(self) -> bool:
        """Whether the model has the signatures of slots."""
        return set(self.metadata()) >= SIGNATURES

    def generate(
        self,
        texts: Sequence[str],
        params: SamplingParams,
        tokenizer: Tokenizer | None = None,
        *,
        slots: bool | None = None,
    ) -> list[Continuation]:
        """Continue each text: in one request by `generate_text` (or with `tokenizer` here if the model lacks it), or,
        with `slots`, over slots.

        By default slots are used for what the one request cannot do: stop texts and token ids, `ignore_eos`. Raises
        InputError for what the graph does not know, and where neither the model nor the caller has a tokenizer.
        """
        if not texts:
            return []
        special = bool(params.stop or params.stop_token_ids or params.ignore_eos)
        if slots or (slots is None and special):
            pieces = SlotTexts(self, tokenizer).run(texts, params, steps=_STEPS, whole=True)
            by_index = {piece.index: piece for piece in pieces}
            ordered = [by_index[index] for index in range(len(texts))]
            return [Continuation(each.text, len(each.token_ids), each.finish_reason or "") for each in ordered]
        check_graph_params(params)
        if special:
            raise InputError(
                "stop texts, stop_token_ids and ignore_eos need slots; the graph's loop does not know them"
            )
        parameters = sampling_inputs(params, len(texts))
        if tokenizer is None or "generate_text" in self.metadata():
            given = np.array([text.encode("utf-8") for text in texts], np.object_)
            outputs = self.predict({"text": given, **parameters}, "generate_text")
            columns = zip(outputs["text"], outputs["lengths"], outputs["finish_reason"], strict=True)
            return [Continuation(as_text(text), int(count), as_text(reason)) for text, count, reason in columns]
        prompts = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        if not all(prompts):
            raise InputError(EMPTY_PROMPT)
        token_ids, lengths = pad_right(prompts)
        padded = {"token_ids": token_ids.astype(np.int32), "lengths": lengths.astype(np.int32)}
        outputs = self.predict(padded | parameters)
        end = self.end_token()
        made = []
        for row, count in zip(outputs["token_ids"], outputs["lengths"], strict=True):
            ids = [int(token) for token in row[: int(count)]]
            reason = "stop" if ids and ids[-1] == end else "length"
            made.append(Continuation(tokenizer.decode(ids, skip_special_tokens=True), len(ids), reason))
        return made

    def attempt(
        self, send: Callable[[float], _T], codes: frozenset[str] = _PASSING, timeout: float | None = None
    ) -> _T:
        """What `send`, told how many seconds are left, gives, tried again after errors of `codes`."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        pause = _FIRST_PAUSE
        for again in range(self._retries, -1, -1):
            left = max(1e-3, deadline - time.monotonic())
            try:
                return send(left / 2 if again and codes is _LOST else left)
            except ServerError as error:
                wait = self.jitter(pause)
                if not (again and error.code in codes and time.monotonic() + wait < deadline):
                    raise
                self.sleep(wait)
                pause = min(2 * pause, _LONGEST_PAUSE)
        raise AssertionError("the last try returns or raises")


def _put_before(
    first: dict[str, Any] | None, rest: Generator[dict[str, Any], None, None]
) -> Generator[dict[str, Any], None, None]:
    with contextlib.closing(rest):
        if first is not None:
            yield first
            yield from rest
