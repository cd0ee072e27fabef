"""What a choice has so far: its text and, where asked for, its log-probabilities in OpenAI's layout."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from serving.engine.api import Engine, FinishEvent, Logprobs, PromptEvent, TokenEvent
from serving.sampling.detokenizer import TokenBytes


class TokenNames:
    """Tokens as strings: their text, or "bytes:\\xNN..." for one that is not valid UTF-8 alone, as OpenAI has it."""

    def __init__(self, engine: Engine) -> None:
        self.bytes = TokenBytes(engine.tokenizer)
        self._tokenizer = engine.tokenizer

    def __getitem__(self, token_id: int) -> str:
        data = self.bytes[token_id]
        if not data:
            return self._tokenizer.id_to_token(token_id) or ""
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


_NAMES: WeakKeyDictionary[Engine, TokenNames] = WeakKeyDictionary()


def token_names(engine: Engine) -> TokenNames:
    """The names of `engine`'s tokens, made once; that takes tens of milliseconds at GPT-2's vocabulary."""
    if engine not in _NAMES:
        _NAMES[engine] = TokenNames(engine)
    return _NAMES[engine]


@dataclass
class LogprobsWriter:
    """Collects tokens; `take` gives those whose text has come, since the last call."""

    names: TokenNames
    top: int
    offset: int = 0
    """Characters of the choice's text before the next token."""
    _pieces: list[tuple[str, float | None, dict[str, float] | None, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int, logprobs: Logprobs | None, in_prompt: bool = False) -> None:
        """Take a token; a special one is text in a prompt and none in a continuation."""
        name = self.names[token_id]
        data = self.names.bytes[token_id]
        own, top = None, None
        if logprobs is not None:
            own = logprobs.own
            top = {self.names[token]: value for token, value in logprobs.top[: self.top]}
            top.setdefault(name, own)
        self._pieces.append((name, own, top, self.offset))
        self.offset += len(self._decoder.decode(data)) if data or not in_prompt else len(name)

    def _ready(self, sent: int | None) -> int:
        if sent is None:
            return len(self._pieces)
        return next((place for place, piece in enumerate(self._pieces) if piece[3] >= sent), len(self._pieces))

    def pending(self, sent: int | None) -> bool:
        """Whether `take` has anything to give."""
        return self._ready(sent) > 0

    def take(self, sent: int | None = None) -> dict[str, Any]:
        """The tokens that begin before character `sent` of the choice's text, or all, as a choice's `logprobs`.

        A token whose text may still turn out to be part of a stop text waits, as the text does.
        """
        ready = self._ready(sent)
        pieces, self._pieces = self._pieces[:ready], self._pieces[ready:]
        keys = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        return (
            dict(zip(keys, map(list, zip(*pieces, strict=True)), strict=True)) if pieces else {key: [] for key in keys}
        )


def prompt_logprobs(
    names: TokenNames, ids: Sequence[int], scores: Sequence[Logprobs | None], top: int
) -> list[dict[str, dict[str, Any]] | None]:
    """A prompt's log-probabilities in vLLM's layout: for each token the `top` likeliest and itself, by id."""

    def entry(token: int, value: float, rank: int) -> dict[str, Any]:
        return {"logprob": value, "rank": rank, "decoded_token": names[token]}

    found: list[dict[str, dict[str, Any]] | None] = []
    for token, score in zip(ids, scores, strict=True):
        if score is None:
            found.append(None)
            continue
        likeliest = {str(one): entry(one, value, rank) for rank, (one, value) in enumerate(score.top[:top], 1)}
        found.append({str(token): entry(token, score.own, score.rank)} | likeliest)
    return found


@dataclass
class Prompt:
    """One prompt of a request. `echo` is its text where it is to be given back."""

    ids: tuple[int, ...]
    implied: bool
    """It was empty, and its one token, the end of a text before, is not part of what is given back."""
    echo: str | None = None


@dataclass
class ChoiceState:
    """One choice as its events come. With `keep_generated` false only the prompt is given back."""

    index: int
    prompt: Prompt
    writer: LogprobsWriter | None
    names: TokenNames | None = None
    """Where log-probabilities are asked for."""
    keep_generated: bool = True
    prompt_top: int | None = None
    """How many of the likeliest tokens to report at each place of the prompt; None reports nothing of it."""
    prompt_logprobs: list[dict[str, dict[str, Any]] | None] | None = None
    ids: list[int] | None = None
    """Ids of the tokens since the last call of `take`, where they are asked for."""
    text: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    tokens: int = 0
    _characters: int = 0
    """Of the text so far, what was taken included."""
    _all: bool = False
    """It ended, and not at a stop text: tokens without text count too."""

    @property
    def scored(self) -> bool:
        """Whether there are log-probabilities to take."""
        return self.writer is not None and self.writer.pending(self._sent)

    @property
    def _sent(self) -> int | None:
        return None if self._all else self._characters

    def _add(self, text: str) -> None:
        self.text += text
        self._characters += len(text)

    def on_prompt(self, event: PromptEvent) -> None:
        """The prompt has been read."""
        if self.prompt_top is not None and self.names is not None:
            ids, scores = self.prompt.ids, event.logprobs or ()
            self.prompt_logprobs = prompt_logprobs(self.names, ids, scores, self.prompt_top)
        if self.prompt.echo is None:
            return
        self._add(self.prompt.echo)
        if self.writer is not None and not self.prompt.implied:
            scores = event.logprobs or (None,) * len(self.prompt.ids)
            for token_id, logprobs in zip(self.prompt.ids, scores, strict=True):
                self.writer.add(token_id, logprobs, in_prompt=True)
            self.writer.offset = len(self.prompt.echo)

    def on_token(self, event: TokenEvent) -> None:
        """A token has come."""
        if not self.keep_generated:
            return
        self.tokens += 1
        self._add(event.text)
        if self.ids is not None:
            self.ids.append(event.token_id)
        if self.writer is not None:
            self.writer.add(event.token_id, event.logprobs)

    def on_finish(self, event: FinishEvent, eos_token_id: int) -> None:
        """It ends, as a result."""
        if not self.keep_generated:
            self.finish_reason, self._all = "length", True
            return
        self._add(event.text)
        self.finish_reason = event.reason
        self._all = not isinstance(event.stopped_by, str)
        # vLLM's rule: null where the model itself ended the text.
        self.stop_reason = None if event.stopped_by == eos_token_id else event.stopped_by

    def take(self) -> dict[str, Any]:
        """What came since the last call, as one entry of `choices`."""
        text, self.text = self.text, ""
        found = {
            "index": self.index,
            "text": text,
            "logprobs": None if self.writer is None else self.writer.take(self._sent),
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
        }
        if self.ids is not None:
            found["token_ids"], self.ids = self.ids, []
        if self.prompt_top is not None:
            found["prompt_logprobs"] = self.prompt_logprobs
        return found
