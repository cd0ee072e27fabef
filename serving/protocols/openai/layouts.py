"""How answers look: the objects of completions and of chat completions, whole and in chunks of a stream."""

from __future__ import annotations

import json
from typing import Any, Protocol

from serving.protocols.openai.choices import ChoiceState, LogprobsWriter, Piece, ScoredToken, TokenNames


class Layout(Protocol):
    """One of the two protocols' answers."""

    operation: str
    """OpenTelemetry's name of what is done."""
    id_prefix: str
    object: str
    chunk_object: str

    def whole(self, choice: ChoiceState) -> dict[str, Any]:
        """All of `choice` as an entry of `choices`."""

    def chunks(self, choice: ChoiceState) -> list[bytes]:
        """What came of `choice` as JSON of entries of `choices`, each for a chunk of its own; none without news."""


class Completions:
    """The objects of /v1/completions."""

    operation = "text_completion"
    id_prefix = "cmpl-"
    object = chunk_object = "text_completion"

    def whole(self, choice: ChoiceState) -> dict[str, Any]:
        """See `Layout`."""
        piece = choice.take()
        found = {
            "index": choice.index,
            "text": piece.text,
            "logprobs": _parallel(choice.writer, piece.scored),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if piece.token_ids is not None:
            found["token_ids"] = piece.token_ids
        if choice.prompt_top is not None:
            found["prompt_logprobs"] = choice.prompt_logprobs
        return found

    def chunks(self, choice: ChoiceState) -> list[bytes]:
        """See `Layout`. The common case, text alone, is written by hand."""
        if not choice.has_news:
            return []
        if choice.writer is not None or choice.finish_reason is not None:
            return [json.dumps(self.whole(choice)).encode()]
        piece = choice.take()
        more = "" if piece.token_ids is None else f', "token_ids": {piece.token_ids}'
        return [
            (
                f'{{"index": {choice.index}, "text": {json.dumps(piece.text)}, "logprobs": null, '
                f'"finish_reason": null, "stop_reason": null{more}}}'
            ).encode()
        ]


def _parallel(writer: LogprobsWriter | None, scored: list[ScoredToken] | None) -> dict[str, Any] | None:
    """Tokens as completions' `logprobs`: four lists, an entry of each for a token."""
    if writer is None or scored is None:
        return None
    rows = []
    for token in scored:
        name = writer.names[token.id]
        own, top = None, None
        if token.logprobs is not None:
            own = token.logprobs.own
            top = {writer.names[id]: value for id, value in token.logprobs.top[: writer.top]}
            top.setdefault(name, own)
        rows.append((name, own, top, token.offset))
    keys = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return dict(zip(keys, map(list, zip(*rows, strict=True)), strict=True)) if rows else {key: [] for key in keys}


class Chat:
    """The objects of /v1/chat/completions: a message, or a role, then pieces of its content, then how it ended."""

    operation = "chat"
    id_prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self) -> None:
        self._begun: set[int] = set()

    def whole(self, choice: ChoiceState) -> dict[str, Any]:
        """See `Layout`."""
        piece = choice.take()
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {
            "index": choice.index,
            "message": message,
            **_chat_rest(choice, piece),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }

    def chunks(self, choice: ChoiceState) -> list[bytes]:
        """See `Layout`. The role comes once the prompt has been read."""
        found = []
        if choice.index not in self._begun:
            self._begun.add(choice.index)
            found.append(_delta(choice.index, '{"role": "assistant", "content": ""}'))
        if not choice.has_news:
            return found
        piece = choice.take()
        if piece.text or piece.scored or piece.token_ids:
            rest = _chat_rest(choice, piece)
            more = "" if len(rest) == 1 else f', "token_ids": {piece.token_ids}'
            logprobs = json.dumps(rest["logprobs"])
            found.append(_delta(choice.index, f'{{"content": {json.dumps(piece.text)}}}', logprobs, more))
        if piece.finish_reason is not None:
            ended = f', "stop_reason": {json.dumps(piece.stop_reason)}'
            found.append(_delta(choice.index, "{}", "null", ended, json.dumps(piece.finish_reason)))
        return found


def _delta(index: int, delta: str, logprobs: str = "null", more: str = "", finish_reason: str = "null") -> bytes:
    return (
        f'{{"index": {index}, "delta": {delta}, "logprobs": {logprobs}, "finish_reason": {finish_reason}{more}}}'
    ).encode()


def _chat_rest(choice: ChoiceState, piece: Piece) -> dict[str, Any]:
    found: dict[str, Any] = {"logprobs": None}
    if choice.writer is not None and piece.scored is not None:
        content = [_chat_token(choice.writer, token) for token in piece.scored]
        found["logprobs"] = {"content": content, "refusal": None}
    if piece.token_ids is not None:
        found["token_ids"] = piece.token_ids
    return found


def _chat_token(writer: LogprobsWriter, token: ScoredToken) -> dict[str, Any]:
    """A token as chat completions have it, its alternatives likeliest first."""
    logprobs = token.logprobs
    top = () if logprobs is None else logprobs.top[: writer.top]
    return {
        **_named(writer.names, token.id),
        "logprob": None if logprobs is None else logprobs.own,
        "top_logprobs": [{**_named(writer.names, id), "logprob": value} for id, value in top],
    }


def _named(names: TokenNames, token_id: int) -> dict[str, Any]:
    """A token's name and its bytes; a special one, which is no part of the text, has none."""
    data = names.bytes[token_id]
    return {"token": names[token_id], "bytes": list(data) if data else None}
