"""Packed token shards, and the tf.data pipelines that cut rows from them.

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
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from builder.tokenizer import can_cut, end_token_id, pieces, vocabulary_size
from serving.errors import InputError

if TYPE_CHECKING:
    import tensorflow as tf

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

    With `max_tokens`, a document of more is left out, or with `trim` cut to its first ones; the index counts these as
    `too_long`.

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
                    ids.extend(document[:max_tokens])
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


def rows_per_epoch(tokens: int, sequence_length: int) -> int:
    """Return the training rows of `sequence_length` in a stream of `tokens`; InputError if there is not even one."""
    if tokens < sequence_length + 1:
        raise InputError(
            f"the training text has {tokens} tokens and one row needs {sequence_length + 1}; "
            "add text in corpus.paths or lower training.sequence_length"
        )
    return tokens // sequence_length


class RowSampler:
    """Rows of a token stream, a pure function of (seed, step).

    In each epoch the stream, taken as a ring, is cut from a random offset into `len // sequence_length` rows that do
    not overlap, in a random order; so rows differ from epoch to epoch and no token is favoured. Rows are numbered
    through all epochs and a batch takes the next ones, across the end of an epoch too.
    """

    def __init__(self, tokens: NDArray[Any], sequence_length: int, batch_size: int, seed: int) -> None:
        self.rows = rows_per_epoch(len(tokens), sequence_length)
        self._tokens = tokens
        self._batch_size = batch_size
        self._seed = seed
        self._within = np.arange(sequence_length + 1)
        self._epoch = -1
        self._starts: NDArray[np.int64] = np.empty(0, np.int64)

    def batch(self, step: int) -> NDArray[np.int32]:
        """Return the rows of a step, int32 [batch, sequence + 1]: inputs are all but the last column, targets all
        but the first."""
        places = (self.starts(step)[:, None] + self._within) % len(self._tokens)
        rows: NDArray[np.int32] = self._tokens[places].astype(np.int32)
        return rows

    def starts(self, step: int) -> NDArray[np.int64]:
        """Return where a step's rows begin in the token stream, int64 [batch], each in [0, len)."""
        numbers = step * self._batch_size + np.arange(self._batch_size)
        starts = np.empty(self._batch_size, np.int64)
        for epoch in np.unique(numbers // self.rows):
            inside = numbers // self.rows == epoch
            starts[inside] = self._epoch_starts(int(epoch))[numbers[inside] % self.rows]
        return starts % len(self._tokens)

    def _epoch_starts(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            random = np.random.default_rng([self._seed, epoch])
            offset = random.integers(len(self._tokens))
            self._starts = offset + random.permutation(self.rows) * (len(self._within) - 1)
            self._epoch = epoch
        return self._starts


def training_dataset(
    tokens: NDArray[Any], *, sequence_length: int, batch_size: int, seed: int, steps: int, start_step: int = 0
) -> tf.data.Dataset:
    """Return a tf.data.Dataset of (inputs, targets), int32 [batch_size, sequence_length] each, targets one token on.

    It gives steps `start_step` to `steps` - 1. Step k is a pure function of (seed, k), so a resumed run sees what an
    unbroken one would have (see `RowSampler`). Raises InputError if there are fewer tokens than one row needs.
    """
    from builder.frameworks import tf

    sampler = RowSampler(tokens, sequence_length, batch_size, seed)

    def generate() -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        for step in range(start_step, steps):
            rows = sampler.batch(step)
            yield rows[:, :-1], rows[:, 1:]

    spec = tf.TensorSpec((batch_size, sequence_length), tf.int32)
    dataset = tf.data.Dataset.from_generator(generate, output_signature=(spec, spec))
    return dataset.apply(tf.data.experimental.assert_cardinality(max(0, steps - start_step))).prefetch(2)


def validation_dataset(tokens: NDArray[Any], *, sequence_length: int, batch_size: int) -> tf.data.Dataset:
    """Return a tf.data.Dataset of (inputs, targets, weights), [batch_size, sequence_length], int32, int32, float32.

    Every token but the first, which has no predecessor, is a target of weight 1 exactly once, in the order of the
    stream; the rest of the last row and batch is padding of id 0 and weight 0. A row sees nothing of the row before.
    Raises InputError if there are fewer than 2 tokens.
    """
    from builder.frameworks import tf

    if len(tokens) < 2:
        raise InputError(
            f"the validation text has {len(tokens)} tokens and needs at least 2; "
            "add text in corpus.paths or raise corpus.validation_fraction"
        )
    targets = len(tokens) - 1
    per_batch = batch_size * sequence_length
    batches = -(-targets // per_batch)
    shape = (batch_size, sequence_length)

    def generate() -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
        for start in range(0, targets, per_batch):
            piece = tokens[start : start + per_batch + 1].astype(np.int32)
            padding = (0, per_batch + 1 - len(piece))
            padded = np.pad(piece, padding)
            weights = np.pad(np.ones(len(piece) - 1, np.float32), padding)
            yield padded[:-1].reshape(shape), padded[1:].reshape(shape), weights.reshape(shape)

    spec = tf.TensorSpec(shape, tf.int32)
    signature = (spec, spec, tf.TensorSpec(shape, tf.float32))
    dataset = tf.data.Dataset.from_generator(generate, output_signature=signature)
    return dataset.apply(tf.data.experimental.assert_cardinality(batches)).prefetch(2)


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
            characters += len(piece) + 1
            if characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch
