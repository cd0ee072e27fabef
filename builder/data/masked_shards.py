"""Token shards of instruction documents: next to the ids, which of them the loss counts.

`train.mask` has one byte a token of `train.bin`: bit 0 is set where the token is counted, bit 1 where it is the last of
its document. The index says `mask`: the `sha256` of that file and `counted`, how many tokens are. Shards of plain text
have none: there every token counts, and each end token ends a document.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from builder.data.character_tokens import CharacterTokens
from builder.data.documents import RESPONSE, Document
from builder.data.token_shards import ShardWriter, open_tokens
from builder.data.tokenizer import can_cut, end_token_id, pieces
from serving.errors import InputError

COUNTED, LAST = 1, 2
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Shard:
    """Token ids [count] with, where not every token is counted, their mask [count] (uint8, see above)."""

    ids: NDArray[Any]
    mask: NDArray[np.uint8] | None = None
    end_token: int | None = None

    @classmethod
    def of(cls, tokens: NDArray[Any] | Shard) -> Shard:
        """Ids of which each is counted, or a shard as it is."""
        return tokens if isinstance(tokens, Shard) else cls(tokens)


def open_shard(path: Path, end_token: int) -> Shard:
    """Return a shard's ids and mask, memory-mapped. Raises InputError as `open_tokens` does, for the mask too."""
    ids = open_tokens(path)
    index, place = json.loads(path.with_suffix(".json").read_text(encoding="utf-8")), path.with_suffix(".mask")
    if "mask" not in index:
        return Shard(ids, None, end_token)
    if not place.is_file() or place.stat().st_size != len(ids):
        raise InputError(f"{place}: not one byte for each of {len(ids)} tokens; run 'gpt2-bundle prepare' again")
    mask = np.memmap(place, np.uint8, mode="r") if len(ids) else np.empty(0, np.uint8)
    return Shard(ids, mask, end_token)


def write_masked_tokens(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    path: Path,
    *,
    max_tokens: int = 0,
    trim: bool = False,
    resume_key: str = "",
    end_token: int | None = None,
) -> int:
    """Encode instruction documents into the shard `path` (.bin), its mask and its index; return the number of tokens.

    As `token_shards.write_tokens`, but each stretch of `Document.runs` is encoded by itself: at inference the prompt
    is too, and a token that spanned the two would never occur there. With `max_tokens` and `trim`, a document is cut
    after its last counted token within the limit. One that has none is left out and counted as `no_response`. Where a
    response was cut, the end token is not counted, because the response did not end there.
    """
    end = end_token_id(tokenizer) if end_token is None else end_token
    characters = CharacterTokens(tokenizer)
    with ShardWriter(path, tokenizer, masked=True, resume_key=resume_key) as shard:
        done = shard.progress
        for batch in _encoded(islice(documents, done.taken, None), tokenizer, end):
            for ids, mask in batch:
                done.taken += 1
                if 0 < max_tokens < len(ids) - 1:
                    done.too_long += 1
                    if not trim:
                        continue
                    ids, mask = _cut(ids, mask, characters.last_place(ids, max_tokens), end)
                if not (mask & COUNTED).any():
                    done.no_response += 1
                    continue
                shard.add(ids, mask)
                done.documents += 1
                done.counted += int((mask & COUNTED).sum())
            shard.end_batch()
        return shard.finish("no_response", *(["too_long"] if max_tokens else []))


def encode_document(
    document: Document, tokenizer: Tokenizer, end_token: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return the ids and the mask of one document, its end token included."""
    end = end_token_id(tokenizer) if end_token is None else end_token
    return next(_encoded([document], tokenizer, end))[0]


def _encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, end: int
) -> Iterator[list[tuple[NDArray[np.int64], NDArray[np.uint8]]]]:
    """Yield the ids and masks of a batch of documents at a time."""
    cut, end_text = can_cut(tokenizer), str(tokenizer.id_to_token(end))
    for batch in _batches(document.with_end(end_text) for document in documents):
        runs = [(index, text, counted) for index, document in enumerate(batch) for text, counted in document.runs]
        parts = [
            (index, part, counted)
            for index, text, counted in runs
            for part in ((piece for piece, _ in pieces(text)) if cut else (text,))
        ]
        encodings = tokenizer.encode_batch([part for _, part, _ in parts], add_special_tokens=False)
        ids: list[list[int]] = [[] for _ in batch]
        marks: list[list[int]] = [[] for _ in batch]
        for (index, _, counted), encoding in zip(parts, encodings, strict=True):
            ids[index] += encoding.ids
            marks[index] += [COUNTED if counted else 0] * len(encoding.ids)
        encoded = []
        for document, tokens, mask in zip(batch, ids, marks, strict=True):
            ends = not document.segments or (document.segments[-1].part == RESPONSE and document.segments[-1].text)
            last = LAST | (COUNTED if ends else 0)
            encoded.append((np.array([*tokens, end]), np.array([*mask, last], np.uint8)))
        yield encoded


def _cut(
    ids: NDArray[np.int64], mask: NDArray[np.uint8], limit: int, end: int
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """A document's first `limit` tokens up to the last counted one, and its end token after them."""
    counted = np.flatnonzero(mask[:limit] & COUNTED)
    kept = int(counted[-1]) + 1 if len(counted) else 0
    if kept and ids[kept - 1] == end:  # A whole turn: its end token becomes the document's.
        return ids[:kept], np.append(mask[: kept - 1], np.uint8(COUNTED | LAST))
    return np.append(ids[:kept], end), np.append(mask[:kept], np.uint8(LAST))


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents into lists of about a million characters."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text) + 1
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
