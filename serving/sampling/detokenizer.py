"""Incremental detokenization: never half a character, never text that may still become a stop string.

A GPT-2 token is a run of bytes, so one character may span several tokens and one token may end inside a character.
"""

from __future__ import annotations

import codecs
import functools
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol

from tokenizers import Tokenizer, decoders

from serving.bundle import TOKENIZER_NAME, Bundle
from serving.bundle.strict_json import refuse
from serving.bundle.tokenizer_file import MAX_BYTES, check_tokenizer
from serving.errors import BundleError, cut


def load_tokenizer(bundle: Bundle) -> Tokenizer:
    """The tokenizer of `bundle`, without padding or truncation. Raises BundleError if its tokenizer.json is none."""
    data = bundle.read(TOKENIZER_NAME, MAX_BYTES)
    check_tokenizer(data, str(bundle.folder))
    try:
        tokenizer = Tokenizer.from_str(data.decode("utf-8"))
    except BaseException as error:  # The library raises the bare class, and panics with one that derives from none.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = cut(" ".join(str(error)[:1000].split()), 200)
        raise refuse(str(bundle.folder), f"tokenizer.json is not a tokenizer ({reason})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, reversed: character -> byte (openai/gpt-2, src/encoder.py).

    Bytes that print stand for themselves; the others are numbered from U+0100 in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


BYTE_ALPHABET = _byte_alphabet()


class TokenBytes:
    """The bytes that each token id of a byte-level BPE or of a WordPiece stands for; special tokens stand for none.

    `special` holds the special tokens by their text. May be shared by any number of streams over one tokenizer. Raises
    BundleError if the tokenizer decodes in another way than those two.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        decoder = tokenizer.decoder
        if not isinstance(decoder, decoders.ByteLevel | decoders.WordPiece):
            raise BundleError(
                "tokenizer.json has neither a ByteLevel nor a WordPiece decoder; build it from another base"
            )
        added = tokenizer.get_added_tokens_decoder().items()
        self.special = {token.content: id for id, token in added if token.special}
        plain = [pair for pair in tokenizer.get_vocab(with_added_tokens=True).items() if pair[0] not in self.special]
        self._first: dict[int, bytes] = {}
        if isinstance(decoder, decoders.ByteLevel):
            self._bytes = {id: _token_bytes(text) for text, id in plain}
            return
        # The decoder joins tokens by blanks and looks at each alone: a token's text is what it adds to another.
        start = decoder.decode(["a"])
        self._bytes = {id: decoder.decode(["a", text]).removeprefix(start).encode("utf-8") for text, id in plain}
        self._first = {id: decoder.decode([text]).encode("utf-8") for text, id in plain}

    def __getitem__(self, token_id: int) -> bytes:
        """The bytes of `token_id`; none for an id outside the vocabulary, which the full decode skips as well."""
        return self._bytes.get(token_id, b"")

    def first(self, token_id: int) -> bytes:
        """The bytes of `token_id` where no token stands before it in the text."""
        return self._first.get(token_id, self[token_id])


def _token_bytes(text: str) -> bytes:
    try:
        return bytes([BYTE_ALPHABET[character] for character in text])
    except KeyError:  # An added token with characters of its own, which the decoder takes as they are.
        return text.encode("utf-8")


class StopAutomaton:
    """Finds the first stop string in text (Aho and Corasick, 1975). Immutable, so any number of matchers share one.

    The first one is the one whose last character comes first; among those that end there, the longest.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """Build the automaton for `stop`, non-empty strings, in time and space linear in their joint length."""
        self.texts = tuple(stop)
        self._next: list[dict[str, int]] = [{}]
        self.depth, self._fallback, self.match = [0], [0], [0]
        for text in stop:
            state = 0
            for character in text:
                if character not in self._next[state]:
                    self._next[state][character] = len(self._next)
                    self._next.append({})
                    self.depth.append(self.depth[state] + 1)
                    self._fallback.append(0)
                    self.match.append(0)
                state = self._next[state][character]
            self.match[state] = self.depth[state]
        pending = deque(self._next[0].values())
        while pending:
            state = pending.popleft()
            self.match[state] = self.match[state] or self.match[self._fallback[state]]
            for character, child in self._next[state].items():
                self._fallback[child] = self.step(self._fallback[state], character)
                pending.append(child)

    def step(self, state: int, character: str) -> int:
        """The state after `character`."""
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)


@functools.lru_cache(maxsize=16)
def stop_automaton(stop: tuple[str, ...]) -> StopAutomaton:
    """The automaton of `stop`. Callers tend to send the same ones with each request."""
    return StopAutomaton(stop)


class StopMatcher:
    """A place in text given character by character, and the stop strings that end there."""

    def __init__(self, stop: Sequence[str] | StopAutomaton) -> None:
        self._automaton = stop if isinstance(stop, StopAutomaton) else StopAutomaton(stop)
        self._state = 0

    def push(self, character: str) -> int:
        """Take one character and return the length of the stop string that ends with it, 0 if none does."""
        self._state = self._automaton.step(self._state, character)
        return self._automaton.match[self._state]

    @property
    def held(self) -> int:
        """How many of the last characters are the beginning of some stop string."""
        return self._automaton.depth[self._state]


class IncrementalDecoder(Protocol):
    """Decodes token ids incrementally, never half a character."""

    def push(self, token_id: int) -> str:
        """Take one token and return the text that is whole by now."""

    def finish(self) -> str:
        """Return the rest; bytes of an unfinished character become U+FFFD."""


class _ByteDecoder:
    def __init__(self, token_bytes: TokenBytes) -> None:
        self._bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = False

    def push(self, token_id: int) -> str:
        data = self._bytes[token_id] if self._begun else self._bytes.first(token_id)
        self._begun = self._begun or bool(self._bytes[token_id])
        return self._decoder.decode(data)

    def finish(self) -> str:
        return self._decoder.decode(b"", True)


class TextStream:
    """Turns token ids into text as they come, up to the first stop string.

    The results of `push` and `finish` joined are `tokenizer.decode(ids)`, special tokens skipped, cut before
    the first stop string (the one that is complete first; the longest of those complete at once). A stop string that
    is a special token's text is found where that token is, though the text does not show it. Time and space are
    amortised O(1) a byte. `stopped_by` is the stop string that was found.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | TokenBytes | IncrementalDecoder,
        stop: Sequence[str] | StopAutomaton | None = None,
        special: Mapping[str, int] | None = None,
    ) -> None:
        """Open a stream over `tokenizer`, a TokenBytes made once for many streams, or another incremental decoder.

        `stop` are non-empty strings, or their automaton, made once for many streams. `special` are the special tokens
        by text, for another incremental decoder.
        """
        if isinstance(tokenizer, Tokenizer):
            tokenizer = TokenBytes(tokenizer)
        if isinstance(tokenizer, TokenBytes):
            special = tokenizer.special
        texts = stop.texts if isinstance(stop, StopAutomaton) else stop or ()
        self._special = {special[text]: text for text in texts if text in special} if special else {}
        self._pieces: IncrementalDecoder = _ByteDecoder(tokenizer) if isinstance(tokenizer, TokenBytes) else tokenizer
        self._matcher = StopMatcher(stop) if stop else None
        self._held: deque[str] = deque()
        self.stopped = False
        self.stopped_by: str | None = None

    def push(self, token_id: int) -> str:
        """Take one token and return the text that is certain by now; "" once a stop string was found."""
        if token_id in self._special and not self.stopped:
            piece = self.finish()
            if not self.stopped:
                self.stopped, self.stopped_by = True, self._special[token_id]
            return piece
        return self._take(self._pieces.push(token_id))

    def finish(self) -> str:
        """Return the rest when no more tokens come; bytes of an unfinished character become U+FFFD."""
        return self._take(self._pieces.finish()) + self._release(0)

    def _take(self, text: str) -> str:
        if self.stopped:
            return ""
        if self._matcher is None:
            return text
        for character in text:
            self._held.append(character)
            length = self._matcher.push(character)
            if length:
                self.stopped = True
                piece = self._release(length)
                self.stopped_by = self._release(0)
                return piece
        return self._release(self._matcher.held)

    def _release(self, keep: int) -> str:
        return "".join([self._held.popleft() for _ in range(len(self._held) - keep)])


@functools.lru_cache(maxsize=8)
def longest_token(tokenizer: Tokenizer) -> int:
    """Bytes of the longest token's text, special tokens included."""
    pieces = TokenBytes(tokenizer)
    ids = tokenizer.get_vocab(with_added_tokens=True)
    return max(len(pieces[token]) or len(text.encode("utf-8")) for text, token in ids.items())
