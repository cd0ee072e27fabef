"""Token shards of instruction documents: beside the ids, which of them the loss counts.

`train.mask` has one byte a token of `train.bin`: bit 0 is set where the token is counted, bit 1 where it is the last of
its document. The index says `mask`: the `sha256` of that file and `counted`, how many tokens are. Shards of plain text
have none: there every token counts, and each end token ends a document.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from builder.data.character_tokens import CharacterTokens
from builder.data.documents import RESPONSE, Document
from builder.data.token_shards import open_tokens
from builder.data.tokenizer import can_cut, end_token_id, pieces, vocabulary_size
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
    end_token: int | None = None,
) -> int:
    """Encode instruction documents into the shard `path` (.bin), its mask and its index; return the tokens.

    As `tokens.write_tokens`, but for this: each stretch of `Document.runs` is encoded by itself, since at inference
    the prompt is too, and a token that spanned the two would never be seen there. With `max_tokens` and `trim`, a
    document is cut behind its last counted token that is left, and one that has none is left out as `no_response`;
    where a response was cut, nothing says that it ended, so the end token there is not counted.
    """
    end = end_token_id(tokenizer) if end_token is None else end_token
    size = vocabulary_size(tokenizer)
    name, dtype = ("uint16", "<u2") if size <= 1 << 16 else ("uint32", "<u4")
    path.parent.mkdir(parents=True, exist_ok=True)
    index, mask_path = path.with_suffix(".json"), path.with_suffix(".mask")
    index.unlink(missing_ok=True)
    ids_digest, mask_digest = hashlib.sha256(), hashlib.sha256()
    written = {"count": 0, "documents": 0, "too_long": 0, "no_response": 0, "counted": 0}
    characters = CharacterTokens(tokenizer)
    with path.open("wb") as ids_file, mask_path.open("wb") as mask_file:
        for ids, mask in _encoded(documents, tokenizer, end):
            if 0 < max_tokens < len(ids) - 1:
                written["too_long"] += 1
                if not trim:
                    continue
                ids, mask = _cut(ids, mask, characters.last_place(ids, max_tokens), end)
            if not (mask & COUNTED).any():
                written["no_response"] += 1
                continue
            data, marks = ids.astype(dtype).tobytes(), mask.tobytes()
            ids_file.write(data)
            mask_file.write(marks)
            ids_digest.update(data)
            mask_digest.update(marks)
            written["count"] += len(ids)
            written["documents"] += 1
            written["counted"] += int((mask & COUNTED).sum())
    record: dict[str, Any] = {
        "dtype": name,
        "byte_order": "little",
        "count": written["count"],
        "documents": written["documents"],
        "vocab_size": size,
        "sha256": ids_digest.hexdigest(),
        "mask": {"counted": written["counted"], "sha256": mask_digest.hexdigest()},
        "no_response": written["no_response"],
    }
    if max_tokens:
        record["too_long"] = written["too_long"]
    index.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return written["count"]


def encode_document(
    document: Document, tokenizer: Tokenizer, end_token: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return the ids and the mask of one document, its end token included."""
    end = end_token_id(tokenizer) if end_token is None else end_token
    return next(_encoded([document], tokenizer, end))


def _encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, end: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
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
        for document, tokens, mask in zip(batch, ids, marks, strict=True):
            ends = not document.segments or (document.segments[-1].part == RESPONSE and document.segments[-1].text)
            yield np.array([*tokens, end]), np.array([*mask, LAST | (COUNTED if ends else 0)], np.uint8)


def _cut(
    ids: NDArray[np.int64], mask: NDArray[np.uint8], limit: int, end: int
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """A document's first `limit` tokens up to the last counted one, and its end token behind them."""
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
