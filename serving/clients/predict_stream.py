"""Texts by PredictStreamed, TensorFlow Serving's streaming call: increments of an answer, put together here.

Of a server that has the call and a model that does not stream, the one increment is the whole answer.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from serving.backends.base import pad_right
from serving.clients.slot_pool import SlotStream, check_graph_params
from serving.clients.transport import EMPTY_PROMPT, Piece, as_text
from serving.errors import InputError
from serving.sampling import SamplingParams
from serving.sampling.detokenizer import TextStream, TokenBytes

# Rows of one call, as `gpt2-bundle serve` takes them.
_ROWS = 128
Open = Callable[[str, Mapping[str, Any]], Generator[dict[str, Any], None, None]]
Take = Callable[[int, Mapping[str, Any]], Piece]


class _Given:
    """Text that comes as text."""

    def __init__(self) -> None:
        self.text = ""

    def push(self, token_id: int) -> str:
        text, self.text = self.text, ""
        return text

    def finish(self) -> str:
        return ""


class StreamedTexts:
    """Prompts over PredictStreamed.

    Args:
        open_stream: begins a call and gives its increments.
        end_token: asks for the token that ends a text.
        tokenizer: the model's; without it the server's is used, which takes texts alone.
    """

    def __init__(self, open_stream: Open, end_token: Callable[[], int], tokenizer: Tokenizer | None = None) -> None:
        self._open, self._end_token, self._tokenizer = open_stream, end_token, tokenizer

    def run(self, prompts: Sequence[str | Sequence[int]], params: SamplingParams) -> Iterator[Piece]:
        """Continue `prompts`, all at once, and yield their text as it arrives.

        Raises InputError, at once, for what the call cannot do, and ServerError. Closing the iterator ends the call.
        """
        check_graph_params(params)
        if params.ignore_eos:
            raise InputError("ignore_eos needs slots; the graph's loop ends at the end token")
        if self._tokenizer is None and params.stop_token_ids:
            raise InputError("stop_token_ids need a tokenizer here, or slots")
        if not all(prompts):
            raise InputError(EMPTY_PROMPT)
        return self._run(prompts, params)

    def _run(self, prompts: Sequence[str | Sequence[int]], params: SamplingParams) -> Iterator[Piece]:
        for first in range(0, len(prompts), _ROWS):
            some = prompts[first : first + _ROWS]
            signature, inputs, take = self._by_ids(some, params) if self._tokenizer else self._by_text(some, params)
            open_rows = set(range(len(some)))
            increments = self._open(signature, inputs | sampling_inputs(params, len(some)))
            try:
                for outputs in increments:
                    for row in sorted(open_rows):
                        piece = take(row, outputs)
                        if piece.finish_reason is not None:
                            open_rows.discard(row)
                        if piece.text or piece.token_ids or piece.finish_reason:
                            yield Piece(first + row, piece.text, piece.token_ids, piece.finish_reason)
                    if not open_rows:
                        break
            finally:
                increments.close()
            for row in sorted(open_rows):  # The context is full.
                yield Piece(first + row, "", (), "length")

    def _by_ids(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams
    ) -> tuple[str, dict[str, Any], Take]:
        assert self._tokenizer is not None
        encode, token_bytes, end = self._tokenizer.encode, TokenBytes(self._tokenizer), self._end_token()
        rows = [encode(each, add_special_tokens=False).ids if isinstance(each, str) else list(each) for each in prompts]
        streams = [SlotStream(row, params, end, lambda: TextStream(token_bytes, params.stop)) for row in rows]

        def take(row: int, outputs: Mapping[str, Any]) -> Piece:
            stream = streams[row]
            tokens = [int(token) for token in outputs["token_ids"][row][: int(outputs["lengths"][row])]]
            made = stream.take(tokens)
            text = "".join(text for _, text in made)
            if stream.reason is not None:
                text += stream.text.finish()
            return Piece(row, text, tuple(token for token, _ in made), stream.reason)

        token_ids, lengths = pad_right(rows)
        return "serving_default", {"token_ids": token_ids.astype(np.int32), "lengths": lengths.astype(np.int32)}, take

    def _by_text(
        self, prompts: Sequence[str | Sequence[int]], params: SamplingParams
    ) -> tuple[str, dict[str, Any], Take]:
        texts = [each for each in prompts if isinstance(each, str)]
        if len(texts) < len(prompts):
            raise InputError("prompts of token ids need a tokenizer here, or slots")
        given = [_Given() for _ in texts]
        streams = [TextStream(each, params.stop) for each in given]

        def take(row: int, outputs: Mapping[str, Any]) -> Piece:
            given[row].text, stream = as_text(outputs["text"][row]), streams[row]
            text = stream.push(0)
            said = as_text(outputs["finish_reason"][row])
            reason: Literal["stop", "length"] | None = "stop" if said == "stop" else "length" if said else None
            if stream.stopped:
                reason = "stop"
            return Piece(row, text + (stream.finish() if reason else ""), (), reason)

        return "generate_text", {"text": np.array([text.encode("utf-8") for text in texts], np.object_)}, take


def sampling_inputs(params: SamplingParams, rows: int) -> dict[str, Any]:
    """The inputs of `serving_default` and `generate_text` that say how `rows` rows are continued, each [rows]."""
    return {
        "max_new_tokens": np.full(rows, params.max_new_tokens, np.int32),
        "temperature": np.full(rows, params.temperature, np.float32),
        "top_k": np.full(rows, params.top_k, np.int32),
        "top_p": np.full(rows, params.top_p, np.float32),
        "seed": np.full(rows, params.seed, np.int64),
    }
