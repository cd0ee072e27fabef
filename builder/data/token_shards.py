"""Packed token shards: written, resumed after an interruption, and read.

A shard is one flat little-endian array of token ids (`train.bin`), each document followed by the end token, beside a
JSON index (`train.json`) with `dtype`, `count`, `documents`, `vocab_size` and the `sha256` of the array.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from builder.data.character_tokens import CharacterTokens
from builder.data.tokenizer import can_cut, end_token_id, pieces, vocabulary_size
from serving.errors import InputError

_DTYPES = {"uint16": "<u2", "uint32": "<u4"}
_BATCH_CHARACTERS = 1 << 20
_BATCHES_AHEAD = 2
_READ_TOKENS = 1 << 20
_BATCHES_A_NOTE = 32


@dataclass(frozen=True)
class _Progress:
    """How far a shard is written: its tokens, and the documents in it; those left out are among `too_long`."""

    key: str = ""
    tokens: int = 0
    documents: int = 0
    too_long: int = 0


def write_tokens(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    path: Path,
    *,
    max_tokens: int = 0,
    trim: bool = False,
    resume_key: str = "",
    end_token: int | None = None,
) -> int:
    """Encode `texts` into the shard `path` (a .bin file) with its index beside it, and return the number of tokens.

    Each document, empty ones too, is followed by `end_token`, which is that of `<|endoftext|>` by default. Ids are
    uint16 up to a vocabulary of 65,536, else uint32. Documents are encoded in parallel batches of about a million
    characters; a long one is cut first, where that changes no token, so memory is bounded.

    With `max_tokens`, a document of more is left out, or with `trim` cut to its first ones that end a character; the
    index counts these as `too_long`.

    With `resume_key`, a name of all that decides the shard, progress is noted now and then in a file beside it
    (.progress, the caller's to remove), and a shard that was left half written with the same key is gone on with.
    """
    end = end_token_id(tokenizer) if end_token is None else end_token
    vocab_size = vocabulary_size(tokenizer)
    name = "uint16" if vocab_size <= 1 << 16 else "uint32"
    path.parent.mkdir(parents=True, exist_ok=True)
    index = path.with_suffix(".json")
    index.unlink(missing_ok=True)
    done = _read_progress(path, resume_key, np.dtype(_DTYPES[name]).itemsize)
    count, documents, too_long = done.tokens, done.documents, done.too_long
    document: list[int] = []
    characters = CharacterTokens(tokenizer)
    with path.open("r+b" if count else "wb") as file:
        digest = _hash_to(file, count * np.dtype(_DTYPES[name]).itemsize)
        batches = _batches(islice(texts, documents + too_long * (not trim), None), can_cut(tokenizer))
        for number, (batch, encodings) in enumerate(_encode_ahead(tokenizer, batches), 1):
            ids: list[int] = []
            for encoding, (_, last) in zip(encodings, batch, strict=True):
                if not max_tokens:
                    ids.extend(encoding.ids)
                elif len(document) <= max_tokens:
                    document.extend(encoding.ids)
                if not last:
                    continue
                excess = len(document) > max_tokens > 0
                too_long += excess
                if not excess or trim:
                    ids.extend(document[: characters.last_place(document, max_tokens)] if excess else document)
                    ids.append(end)
                    documents += 1
                document.clear()
            data = np.asarray(ids, dtype=_DTYPES[name]).tobytes()
            file.write(data)
            digest.update(data)
            count += len(ids)
            if resume_key and number % _BATCHES_A_NOTE == 0 and batch[-1][1]:
                file.flush()
                _write_progress(path, _Progress(resume_key, count, documents, too_long))
    if resume_key:
        _write_progress(path, _Progress(resume_key, count, documents, too_long))
    record = {
        "dtype": name,
        "byte_order": "little",
        "count": count,
        "documents": documents,
        "vocab_size": vocab_size,
        "sha256": digest.hexdigest(),
    }
    if max_tokens:
        record["too_long"] = too_long
    index.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return count


def open_tokens(path: Path) -> NDArray[Any]:
    """Return the ids of a shard, memory-mapped and read-only, as uint16 or uint32 [count].

    Raises InputError if the shard or its index is missing, or if their sizes differ.
    """
    index = path.with_suffix(".json")
    advice = "run 'gpt2-bundle prepare' again"
    try:
        record = json.loads(index.read_text(encoding="utf-8"))
        name, count = record["dtype"], int(record["count"])
        dtype = np.dtype(_DTYPES[name])
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: no such file, so there are no prepared tokens; {advice}") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{index}: not the index of a token shard; {advice}") from None
    if size != count * dtype.itemsize:
        raise InputError(f"{path}: {size} bytes where its index says {count} tokens of {dtype.itemsize}; {advice}")
    if count == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,))


def read_tokens(path: Path) -> Iterator[NDArray[Any]]:
    """Yield the ids of a shard, a million at a time; unlike pages of a mapped file they do not stay in memory.

    Raises what `open_tokens` does.
    """
    tokens = open_tokens(path)
    for start in range(0, len(tokens), _READ_TOKENS):
        yield np.fromfile(path, tokens.dtype, _READ_TOKENS, offset=start * tokens.itemsize)


def _read_progress(path: Path, key: str, item_bytes: int) -> _Progress:
    """What was noted of a shard with this key and is still there; nothing without a key."""
    try:
        progress = _Progress(**json.loads(path.with_suffix(".progress").read_text(encoding="utf-8")))
        if key and progress.key == key and path.stat().st_size >= progress.tokens * item_bytes:
            return progress
    except (OSError, ValueError, TypeError):
        pass
    return _Progress()


def _write_progress(path: Path, progress: _Progress) -> None:
    partial = path.with_suffix(".progress.partial")
    partial.write_text(json.dumps(asdict(progress)), encoding="utf-8")
    partial.replace(path.with_suffix(".progress"))


def _hash_to(file: BinaryIO, size: int) -> hashlib._Hash:
    """Hash the first `size` bytes of a file, cut it there, and stand there."""
    digest = hashlib.sha256()
    for start in range(0, size, 1 << 20):
        digest.update(file.read(min(1 << 20, size - start)))
    file.truncate(size)
    return digest


def _encode_ahead(
    tokenizer: Tokenizer, batches: Iterable[list[tuple[str, bool]]]
) -> Iterator[tuple[list[tuple[str, bool]], list[Encoding]]]:
    """Yield each batch with its encodings, while the next ones are encoded; offsets are not worked out."""
    under_way: deque[tuple[list[tuple[str, bool]], Future[list[Encoding]]]] = deque()
    with ThreadPoolExecutor(1) as thread:
        for batch in batches:
            texts = [piece for piece, _ in batch]
            under_way.append((batch, thread.submit(tokenizer.encode_batch_fast, texts, add_special_tokens=False)))
            if len(under_way) > _BATCHES_AHEAD:
                done, encodings = under_way.popleft()
                yield done, encodings.result()
        for done, encodings in under_way:
            yield done, encodings.result()


def _batches(texts: Iterable[str], cut: bool) -> Iterator[list[tuple[str, bool]]]:
    """Group (piece of a document, is its last) into lists of about `_BATCH_CHARACTERS`."""
    batch: list[tuple[str, bool]] = []
    characters = 0
    for text in texts:
        for piece, last in pieces(text) if cut else [(text, True)]:
            batch.append((piece, last))
            # A character of three bytes is as much to encode as three of one.
            characters += (len(piece) if piece.isascii() else 3 * len(piece)) + 1
            if characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch
