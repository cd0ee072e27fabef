"""Texts over a server's slots: prompts that advance together, given out as they come (docs/slots.md)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

from serving.clients.slot_pool import STALE, SlotPool, SlotStream, check_slot_params
from serving.clients.transport import EMPTY_PROMPT, Piece, RetryingClient, as_text
from serving.errors import InputError, ServerError
from serving.sampling import SamplingParams
from serving.sampling.detokenizer import TextStream, TokenBytes

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
# How often a text is begun again whose slot was lost before anything of it was given out.
_RESTARTS = 3


class _ServerPieces:
    """Text made by the server's `detokenize`, a call a token, for a client without the tokenizer."""

    def __init__(self, client: RetryingClient) -> None:
        self._client = client
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._text()
        # It may be the beginning of a character, and then only the tokens together have its bytes.
        if text.endswith("\ufffd"):
            return ""
        self._pending.clear()
        return text

    def finish(self) -> str:
        return self._text() if self._pending else ""

    def _text(self) -> str:
        rows = {"token_ids": np.array([self._pending], np.int32), "lengths": np.array([len(self._pending)], np.int32)}
        return as_text(self._client.predict(rows, "detokenize")["text"][0])


class SlotTexts:
    """Prompts over the slots of one server.

    Args:
        client: sends the calls, each again within its deadline where an answer was lost.
        tokenizer: the model's; without it the server's `tokenize` and `detokenize` are asked.
    """

    def __init__(self, client: RetryingClient, tokenizer: Tokenizer | None = None) -> None:
        self._client, self._tokenizer = client, tokenizer
        self._token_bytes = None if tokenizer is None else TokenBytes(tokenizer)
        self._specials: dict[str, int | None] = {}

    def run(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams, *, steps: int, whole: bool = False
    ) -> Iterator[Piece]:
        """Continue `prompts`; yield their text as it arrives, or, with `whole`, each text at once.

        Raises InputError, at once, for what slots cannot do, and ServerError: RESOURCE_EXHAUSTED if no slot came free
        within the client's timeout, ABORTED if a text lost its slot after some of it was given out. However it ends,
        the slots are given back.
        """
        check_slot_params(params)
        rows = self._encode(prompts)
        if not rows:
            return iter(())
        if not all(rows):
            raise InputError(EMPTY_PROMPT)
        end = self._client.end_token()
        return self._run([SlotStream(row, params, end, lambda: self._open(params)) for row in rows], steps, whole)

    def _run(self, streams: list[SlotStream], steps: int, whole: bool) -> Iterator[Piece]:
        pool = SlotPool(self._client.repeat, steps=steps)
        pool.waiting.extend(streams)
        index = {stream: number for number, stream in enumerate(streams)}
        given: dict[SlotStream, list[str]] = {stream: [] for stream in streams}
        restarts = dict.fromkeys(streams, _RESTARTS)
        try:
            for stream, tokens in self._advance(pool):
                if stream.status == STALE:
                    if (given[stream] and not whole) or not restarts[stream]:
                        raise ServerError(
                            f"the server no longer has the slot of prompt {index[stream]}: its lease ran out, or the "
                            "model was loaded again; send the prompt again",
                            "ABORTED",
                        )
                    restarts[stream] -= 1
                    given[stream] = []
                    pool.restart(stream)
                    continue
                made = stream.take(tokens)
                text = "".join(piece for _, piece in made)
                if stream.reason is not None:
                    text += stream.text.finish()
                    pool.leave([stream])
                elif stream.goes_on:
                    pool.go_on(stream)
                if not whole:
                    given[stream].append(text)
                    yield Piece(index[stream], text, tuple(token for token, _ in made), stream.reason)
                    continue
                given[stream].append(text)
                if stream.reason is not None:
                    yield Piece(index[stream], "".join(given[stream]), tuple(stream.tokens), stream.reason)
        finally:
            pool.leave(streams)

    def _advance(self, pool: SlotPool) -> Iterator[tuple[SlotStream, list[int]]]:
        """Give streams with what came of each, until none is left; wait while no slot is free."""
        pause, ask_at = _FIRST_PAUSE, 0.0
        patience = time.monotonic() + self._client.timeout
        while pool.waiting or pool.running:
            now = time.monotonic()
            if pool.running:
                patience = now + self._client.timeout
            if pool.waiting and now >= ask_at:
                rows = pool.next_prompts()
                placed = pool.prefill(rows)
                pause = _FIRST_PAUSE if placed else min(2 * pause, _LONGEST_PAUSE)
                ask_at = 0.0 if len(placed) == len(rows) else time.monotonic() + self._client.jitter(pause)
                yield from placed
                if placed:
                    continue
            if pool.running:
                before = len(pool.running)
                yield from pool.decode()
                if len(pool.running) < before:
                    ask_at = 0.0
            elif pool.waiting:
                if time.monotonic() > patience:
                    raise ServerError(
                        f"no slot came free within {self._client.timeout:g} s; try later, or export with more "
                        "(export.slots)",
                        "RESOURCE_EXHAUSTED",
                    )
                self._client.sleep(max(0.0, ask_at - time.monotonic()))

    def _encode(self, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
        rows: list[list[int]] = []
        for prompt in prompts:
            if not isinstance(prompt, str):
                rows.append(list(prompt))
            elif self._tokenizer is not None:
                rows.append(self._tokenizer.encode(prompt, add_special_tokens=False).ids)
            elif not prompt:
                rows.append([])
            else:
                given = {"text": np.array([prompt.encode("utf-8")], np.object_)}
                answer = self._client.predict(given, "tokenize")
                rows.append([int(token) for token in answer["token_ids"][0][: int(answer["lengths"][0])]])
        return rows

    def _open(self, params: SamplingParams) -> TextStream:
        if self._token_bytes is not None:
            return TextStream(self._token_bytes, params.stop_automaton)
        return TextStream(_ServerPieces(self._client), params.stop_automaton, self._special_tokens(params.stop))

    def _special_tokens(self, texts: Sequence[str]) -> dict[str, int]:
        """Those of `texts` that are one token which the server's detokenizer leaves out, with its id."""
        found: dict[str, int] = {}
        for text in texts:
            if text not in self._specials:
                (ids,) = self._encode([text])
                silent = len(ids) == 1 and not _ServerPieces(self._client).push(ids[0])
                self._specials[text] = ids[0] if silent else None
            token = self._specials[text]
            if token is not None:
                found[text] = token
        return found
