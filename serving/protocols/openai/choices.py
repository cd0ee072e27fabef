"""What a choice has so far: its text and, where asked for, its log-probabilities."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
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


@dataclass(frozen=True)
class ScoredToken:
    """A token, its log-probabilities, and where its text begins, in characters of the choice's text."""

    id: int
    logprobs: Logprobs | None
    offset: int


@dataclass
class LogprobsWriter:
    """Collects tokens; `take` gives those whose text has come, since the last call."""

    names: TokenNames
    top: int
    offset: int = 0
    """Characters of the choice's text before the next token."""
    _tokens: list[ScoredToken] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int, logprobs: Logprobs | None, in_prompt: bool = False) -> None:
        """Take a token; a special one is text in a prompt and none in a continuation."""
        data = self.names.bytes[token_id]
        self._tokens.append(ScoredToken(token_id, logprobs, self.offset))
        self.offset += len(self._decoder.decode(data)) if data or not in_prompt else len(self.names[token_id])

    def _ready(self, sent: int | None) -> int:
        if sent is None:
            return len(self._tokens)
        return next((place for place, token in enumerate(self._tokens) if token.offset >= sent), len(self._tokens))

    def pending(self, sent: int | None) -> bool:
        """Whether `take` has anything to give."""
        return self._ready(sent) > 0

    def take(self, sent: int | None = None) -> list[ScoredToken]:
        """The tokens that begin before character `sent` of the choice's text, or all.

        A token whose text may still turn out to be part of a stop text waits, as the text does.
        """
        ready = self._ready(sent)
        tokens, self._tokens = self._tokens[:ready], self._tokens[ready:]
        return tokens


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


class Piece(NamedTuple):
    """What came of a choice between two looks; `scored` and `token_ids` are None where they are not asked for."""

    text: str
    scored: list[ScoredToken] | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: list[int] | None


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
    def has_news(self) -> bool:
        """Whether there is anything to take: a token may have no text yet, or none at all."""
        scored = self.writer is not None and self.writer.pending(self._sent)
        return bool(self.text or self.finish_reason or self.ids or scored)

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

    def take(self) -> Piece:
        """What came since the last call."""
        text, self.text = self.text, ""
        ids = self.ids
        if ids is not None:
            self.ids = []
        scored = None if self.writer is None else self.writer.take(self._sent)
        return Piece(text, scored, self.finish_reason, self.stop_reason, ids)
