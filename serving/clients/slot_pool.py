"""Generations in a SavedModel's slots, from the caller's side of docs/slots.md: one pool of streams over one server.

A pool sends calls and keeps places; what a stream's tokens mean (end tokens, stop texts, budgets) the stream knows.
Every call may be sent again after an answer was lost, since rows name what they want.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import secrets
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from serving.backends.base import pad_right
from serving.clients.outliving_calls import CallGoesOnError
from serving.deploy.tf_serving_config import BATCH_SIZES
from serving.errors import InputError, ServerError
from serving.sampling import DECLARATIONS, SamplingParams
from serving.sampling.detokenizer import TextStream

# A row's answer. What every correct client may meet is a status and no error, which would fail the rows of others too.
RUNNING, FINISHED, NO_FREE_SLOT, STALE, AHEAD, CANCELLED = 0, 1, -1, -2, -3, -4

SIGNATURES = frozenset({"prefill_slots", "decode_slots", "release_slots"})
# What the graph does not compute, by the names of the fields of SamplingParams. Stop texts and stop token ids are
# looked for by the stream; `ignore_eos` it does by a new prompt, which for a sampled text would draw other numbers.
UNSUPPORTED = frozenset({"logit_bias", *(each.name for each in DECLARATIONS.values() if not each.slots)})
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
# Rows of one call at most, the largest batch that the server's configuration takes.
ROWS = BATCH_SIZES[-1]
# Padded prompt tokens of one call at most, unless one prompt has more: running streams wait while prompts run.
PROMPT_TOKENS = 2048

# What servers say of a signature that the model does not have.
_NO_SIGNATURE = frozenset({"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "UNIMPLEMENTED"})
# Seconds that giving slots back may take; a slot's lease ends by itself.
_FAREWELL = 5.0


class Predict(Protocol):
    """Runs a signature and sends it again where an answer may have been lost; `TFServingClient.repeat` is one."""

    def __call__(
        self,
        signature: str,
        inputs: Mapping[str, Any],
        timeout: float | None = None,
        late: Callable[[dict[str, Any] | None], None] | None = None,
    ) -> dict[str, Any]: ...


def check_graph_params(params: SamplingParams) -> None:
    """Raise InputError for what the SavedModel's graph cannot do."""
    for name in sorted(UNSUPPORTED):
        if getattr(params, name) != _DEFAULTS[name]:
            raise InputError(f"{name} is not done in the SavedModel's graph; leave it out")


def check_slot_params(params: SamplingParams) -> None:
    """Raise InputError for what cannot be done over slots."""
    check_graph_params(params)
    if params.ignore_eos and params.temperature > 0 and params.top_k != 1:
        raise InputError("ignore_eos needs temperature 0 over slots: the graph ends a sampled text at its end token")


class SlotStream:
    """One continuation: what was asked for, its place on the server, and what came.

    Args:
        prompt: token ids, at least one.
        params: as `check_slot_params` lets them pass.
        eos_token_id: the token that ends a text.
        open_text: makes the stream's text, at each beginning.
    """

    def __init__(
        self, prompt: Sequence[int], params: SamplingParams, eos_token_id: int, open_text: Callable[[], TextStream]
    ) -> None:
        self.params, self._eos, self._open_text = params, eos_token_id, open_text
        self._prompt = tuple(prompt)
        self.restart()

    def restart(self) -> None:
        """Restart: no tokens, and a request for another slot."""
        self.prompt, self.budget = self._prompt, self.params.max_new_tokens
        self.tokens: list[int] = []
        self.text = self._open_text()
        self.reason: Literal["stop", "length"] | None = None
        self.stopped_by: str | int | None = None
        self.ask()

    def ask(self) -> None:
        """Want a slot under a new name, with nothing received."""
        self.request_id = 1 + secrets.randbelow(2**63 - 1)
        self.slot, self.generation, self.received, self.status = -1, 0, 0, RUNNING
        # Whether the server may have given it a slot that this side has not heard of.
        self.asked = False
        # Whether a call that asks for it has not ended.
        self.under_way = False

    def take(self, tokens: Sequence[int]) -> list[tuple[int, str]]:
        """Return each token that counts, with the text certain by it; sets `reason` if the last is among them."""
        made = []
        for token in tokens:
            if self.reason is not None:
                break
            self.received += 1
            self.tokens.append(token)
            made.append((token, self.text.push(token)))
            if self.text.stopped:
                self.reason, self.stopped_by = "stop", self.text.stopped_by
            elif token in self.params.stop_token_ids or (token == self._eos and not self.params.ignore_eos):
                self.reason, self.stopped_by = "stop", token
            elif len(self.tokens) == self.params.max_new_tokens:
                self.reason = "length"
        if self.reason is None and self.status == FINISHED and not (tokens and tokens[-1] == self._eos):
            self.reason = "length"  # The context is full.
        return made

    @property
    def goes_on(self) -> bool:
        """Whether the server has ended what is not at its end, at an end token to be ignored."""
        return self.reason is None and self.status == FINISHED

    def go_on(self) -> None:
        """Turn all tokens so far into a prompt; it needs another slot."""
        self.prompt = (*self._prompt, *self.tokens)
        self.budget = self.params.max_new_tokens - len(self.tokens)
        self.ask()


class SlotPool:
    """The streams that wait for a slot, in `waiting`, and those that hold one, in `running`.

    `predict` waits `timeout` seconds or, for None, as long as is usual. `steps` is how many tokens a stream gets by a
    call at most.
    """

    def __init__(self, predict: Predict, *, steps: int = 1) -> None:
        self._predict, self._steps = predict, steps
        self.waiting: deque[SlotStream] = deque()
        self.running: list[SlotStream] = []
        self._leaving = threading.Lock()

    def next_prompts(self, most: int = ROWS) -> list[SlotStream]:
        """The first of those that wait, as many as one call should run."""
        rows: list[SlotStream] = []
        for stream in self.waiting:
            longest = max(len(each.prompt) for each in [*rows, stream])
            if len(rows) == min(most, ROWS) or (rows and longest * (len(rows) + 1) > PROMPT_TOKENS):
                break
            rows.append(stream)
        return rows

    def prefill(self, streams: Sequence[SlotStream]) -> list[tuple[SlotStream, list[int]]]:
        """Ask for slots for some that wait; return those that got one with their first tokens.

        The others keep waiting. Raises ServerError, and then all of them wait.
        """
        token_ids, lengths = pad_right([stream.prompt for stream in streams])
        for stream in streams:
            stream.asked = stream.under_way = True
        every, names = [stream.params for stream in streams], [stream.request_id for stream in streams]
        inputs = {
            "request_id": np.array(names, np.int64),
            "token_ids": token_ids.astype(np.int32),
            "lengths": lengths.astype(np.int32),
            "max_new_tokens": np.array([stream.budget for stream in streams], np.int32),
            "temperature": np.array([params.temperature for params in every], np.float32),
            "top_k": np.array([params.top_k for params in every], np.int32),
            "top_p": np.array([params.top_p for params in every], np.float32),
            "seed": np.array([params.seed for params in every], np.int64),
        }
        late = functools.partial(self._came_late, list(streams), names)
        try:
            answer = self._predict("prefill_slots", inputs, None, late)
        except CallGoesOnError:
            raise
        except ServerError:
            for stream in streams:
                stream.under_way = False
            raise
        placed = []
        for row, stream in enumerate(streams):
            status, stream.asked, stream.under_way = int(answer["status"][row]), False, False
            if status == NO_FREE_SLOT:
                continue
            if status == CANCELLED:  # Somebody gave its name back.
                stream.ask()
                continue
            stream.status, stream.slot = status, int(answer["slot"][row])
            stream.generation = int(answer["generation"][row])
            self.waiting.remove(stream)
            self.running.append(stream)
            placed.append((stream, _tokens(answer, row)))
        return placed

    def decode(self) -> list[tuple[SlotStream, list[int]]]:
        """Advance all that run; return them with their new tokens, none where `status` is STALE. Raises ServerError."""
        made = []
        for start in range(0, len(self.running), ROWS):
            streams = self.running[start : start + ROWS]
            received = np.array([stream.received for stream in streams], np.int32)
            steps = np.full(len(streams), self._steps, np.int32)
            answer = self._predict("decode_slots", {**_places(streams), "received": received, "steps": steps}, None)
            for row, stream in enumerate(streams):
                stream.status = int(answer["status"][row])
                if stream.status == AHEAD:
                    raise ServerError("the server has made fewer tokens than it gave; restart it", "DATA_LOSS")
                made.append((stream, _tokens(answer, row)))
        return made

    def leave(self, streams: Collection[SlotStream]) -> None:
        """Take streams out, wherever they are, and give their slots back, if the server answers in a few seconds.

        A stream whose prompt was sent without an answer may have a slot: that one is given back by the stream's name.
        """
        with self._leaving:
            held = [stream for stream in self.running if stream in streams]
            unheard = [stream for stream in self.waiting if stream in streams and stream.asked]
            lost = [stream.request_id for stream in unheard if not stream.under_way]
            self.running = [stream for stream in self.running if stream not in streams]
            self.waiting = deque(stream for stream in self.waiting if stream not in streams)
        for start in range(0, len(held), ROWS):
            with contextlib.suppress(ServerError):
                self._predict("release_slots", _places(held[start : start + ROWS]), _FAREWELL)
        for start in range(0, len(unheard), ROWS):
            with contextlib.suppress(ServerError, InputError):
                self._cancel([stream.request_id for stream in unheard[start : start + ROWS]], lost)

    def _cancel(self, names: Sequence[int], lost: Collection[int]) -> None:
        """Give back the slots of `names`, also those that calls under way will still give them.

        For a SavedModel without the signature: those of `lost` names alone, whose calls have ended; the others are
        given back when theirs end.
        """
        try:
            self._predict("cancel_slots", {"request_id": np.array(names, np.int64)}, _FAREWELL)
            return
        except InputError:
            pass
        except ServerError as error:
            if error.code not in _NO_SIGNATURE:
                raise
        self._release_by_name([name for name in names if name in lost])

    def _release_by_name(self, names: Sequence[int]) -> None:
        """A prompt of the same name gets the slot that is there; should it be none, the shortest one costs least."""
        if not names:
            return
        ones = np.ones(len(names), np.int32)
        answer = self._predict(
            "prefill_slots",
            {
                "request_id": np.array(names, np.int64),
                "token_ids": np.zeros([len(names), 1], np.int32),
                "lengths": ones,
                "max_new_tokens": ones,
                "temperature": np.zeros(len(names), np.float32),
                "top_k": 0 * ones,
                "top_p": np.ones(len(names), np.float32),
                "seed": np.zeros(len(names), np.int64),
            },
            _FAREWELL,
        )
        self._release(answer, range(len(names)))

    def _release(self, answer: Mapping[str, Any], rows: Iterable[int]) -> None:
        """Give back the slots in some rows of a prompt's answer."""
        some = [row for row in rows if answer["slot"][row] >= 0]
        if some:
            held = {name: np.asarray(answer[name])[some] for name in ("slot", "generation")}
            self._predict("release_slots", held, _FAREWELL)

    def _came_late(self, streams: Sequence[SlotStream], names: Sequence[int], answer: dict[str, Any] | None) -> None:
        """Give back, in the thread of a prompt's call, the slots of a caller that has left."""
        unwanted = []
        with self._leaving:
            for row, (stream, name) in enumerate(zip(streams, names, strict=True)):
                if stream.request_id == name and (stream in self.waiting or stream in self.running):
                    stream.under_way = False  # Its caller will continue or leave.
                else:
                    unwanted.append(row)
        with contextlib.suppress(ServerError, InputError):
            if answer is None:
                self._release_by_name([names[row] for row in unwanted])
            else:
                self._release(answer, unwanted)

    def go_on(self, stream: SlotStream) -> None:
        """Give the slot of a stream that `goes_on` back, and let it wait for another, before all others."""
        self.leave([stream])
        stream.go_on()
        self.waiting.appendleft(stream)

    def restart(self, stream: SlotStream) -> None:
        """Let a stream wait for a slot again from its beginning, before all others."""
        self.running.remove(stream)
        stream.restart()
        self.waiting.appendleft(stream)


def _places(streams: Sequence[SlotStream]) -> dict[str, Any]:
    return {
        "slot": np.array([stream.slot for stream in streams], np.int32),
        "generation": np.array([stream.generation for stream in streams], np.int64),
    }


def _tokens(answer: Mapping[str, Any], row: int) -> list[int]:
    return [int(token) for token in answer["token_ids"][row][: int(answer["lengths"][row])]]
