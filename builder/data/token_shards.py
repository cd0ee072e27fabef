"""Packed token shards: written, resumed after an interruption, and read.

A shard is one flat little-endian array of token ids (`train.bin`), each document followed by the end token, with a
JSON index (`train.json`) with `dtype`, `count`, `documents`, `vocab_size` and the `sha256` of the array.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
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


@dataclass
class Progress:
    """What of its documents a shard has: those taken from the stream, and what became of them and of their tokens."""

    key: str = ""
    taken: int = 0
    tokens: int = 0
    documents: int = 0
    too_long: int = 0
    no_response: int = 0
    counted: int = 0


class ShardWriter:
    """Writes a shard's ids, its mask if it has one, and its index; resumes a shard that was left half written.

    With `resume_key`, which names all that decides the shard, progress is noted now and then in a file next to it
    (.progress, the caller's to remove). The caller continues the stream of documents after `progress.taken`.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, *, masked: bool = False, resume_key: str = "") -> None:
        self._vocab_size = vocabulary_size(tokenizer)
        self._dtype_name = "uint16" if self._vocab_size <= 1 << 16 else "uint32"
        self._dtype = np.dtype(_DTYPES[self._dtype_name])
        self._path, self._index, self._key = path, path.with_suffix(".json"), resume_key
        self._places = {path: self._dtype.itemsize} | ({path.with_suffix(".mask"): 1} if masked else {})
        self._batches = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._index.unlink(missing_ok=True)
        self.progress = _read_progress(path, resume_key, self._places)

    def __enter__(self) -> ShardWriter:
        self._open = ExitStack()
        tokens = self.progress.tokens
        self._files = [self._open.enter_context(place.open("r+b" if tokens else "wb")) for place in self._places]
        sizes = [tokens * size for size in self._places.values()]
        self._digests = [_hash_to(file, size) for file, size in zip(self._files, sizes, strict=True)]
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def add(self, ids: Sequence[int] | NDArray[Any], mask: NDArray[np.uint8] | None = None) -> None:
        """Append token ids, and their mask where the shard has one."""
        stored = [np.asarray(ids, self._dtype).tobytes(), *([] if mask is None else [mask.tobytes()])]
        for data, file, digest in zip(stored, self._files, self._digests, strict=True):
            file.write(data)
            digest.update(data)
        self.progress.tokens += len(ids)

    def end_batch(self) -> None:
        """Note the progress of every 32nd batch. Call it where no document is half written."""
        self._batches += 1
        if self._batches % _BATCHES_A_NOTE == 0:
            self._note()

    def finish(self, *more: str) -> int:
        """Write the index, with the counts named in `more`; return the number of tokens."""
        self._note()
        done, digests = self.progress, [digest.hexdigest() for digest in self._digests]
        record: dict[str, Any] = {
            "dtype": self._dtype_name,
            "byte_order": "little",
            "count": done.tokens,
            "documents": done.documents,
            "vocab_size": self._vocab_size,
            "sha256": digests[0],
        }
        if len(digests) > 1:
            record["mask"] = {"counted": done.counted, "sha256": digests[1]}
        record |= {name: getattr(done, name) for name in more}
        self._index.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return done.tokens

    def _note(self) -> None:
        if self._key:
            for file in self._files:
                file.flush()
            partial = self._path.with_suffix(".progress.partial")
            partial.write_text(json.dumps(asdict(self.progress)), encoding="utf-8")
            partial.replace(self._path.with_suffix(".progress"))


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
    """Encode `texts` into the shard `path` (a .bin file) with its index next to it, and return the number of tokens.

    Each document, empty ones too, is followed by `end_token`, which is that of `<|endoftext|>` by default. Ids are
    uint16 up to a vocabulary of 65,536, else uint32. Documents are encoded in parallel batches of about a million
    characters; a long one is cut first, where that changes no token, so memory is bounded.

    With `max_tokens`, a document of more is left out, or with `trim` cut to its first ones that end a character; the
    index counts these as `too_long`. `resume_key` is that of `ShardWriter`.
    """
    end = end_token_id(tokenizer) if end_token is None else end_token
    document: list[int] = []
    characters = CharacterTokens(tokenizer)
    with ShardWriter(path, tokenizer, resume_key=resume_key) as shard:
        done = shard.progress
        batches = _batches(islice(texts, done.taken, None), can_cut(tokenizer))
        for batch, encodings in _encode_ahead(tokenizer, batches):
            ids: list[int] = []
            for encoding, (_, last) in zip(encodings, batch, strict=True):
                if not max_tokens:
                    ids.extend(encoding.ids)
                elif len(document) <= max_tokens:
                    document.extend(encoding.ids)
                if not last:
                    continue
                done.taken += 1
                excess = len(document) > max_tokens > 0
                done.too_long += excess
                if not excess or trim:
                    ids.extend(document[: characters.last_place(document, max_tokens)] if excess else document)
                    ids.append(end)
                    done.documents += 1
                document.clear()
            shard.add(ids)
            if batch[-1][1]:
                shard.end_batch()
        return shard.finish(*(["too_long"] if max_tokens else []))


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


def _read_progress(path: Path, key: str, places: Mapping[Path, int]) -> Progress:
    """What was noted of a shard with this key, if its files (with the bytes of a token in each) still have that."""
    try:
        progress = Progress(**json.loads(path.with_suffix(".progress").read_text(encoding="utf-8")))
        whole = all(place.stat().st_size >= progress.tokens * size for place, size in places.items())
        if key and progress.key == key and whole:
            return progress
    except (OSError, ValueError, TypeError):
        pass
    return Progress(key)


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
