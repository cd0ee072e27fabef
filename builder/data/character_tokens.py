"""Which tokens begin inside a character: a token of a byte-level BPE may be any part of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders

from serving.sampling.detokenizer import BYTE_ALPHABET


class CharacterTokens:
    """Finds places between whole characters in the tokens of a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        vocabulary = tokenizer.get_vocab() if isinstance(tokenizer.decoder, decoders.ByteLevel) else {}
        # In UTF-8, bytes from 0x80 to 0xBF continue a character.
        going_on = {letter for letter, byte in BYTE_ALPHABET.items() if 0x80 <= byte < 0xC0}
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        self._inside = frozenset(id for text, id in vocabulary.items() if text[:1] in going_on and text not in added)

    def last_place(self, ids: Sequence[int] | NDArray[Any], limit: int) -> int:
        """Return the last place up to `limit` where the tokens can be cut, or `limit` if there is none."""
        place = min(limit, len(ids))
        while place > 0 and place < len(ids) and int(ids[place]) in self._inside:
            place -= 1
        return place or limit

    def next_place(self, ids: Sequence[int] | NDArray[Any], place: int) -> int:
        """Return the first place from `place` on where the tokens can be cut."""
        while place < len(ids) and int(ids[place]) in self._inside:
            place += 1
        return place
