"""Rows of one document each, and the weights of what a batch is trained and validated on.

A row's targets are its tokens but the first. Weights are 0 for padding and for what the mask does not count.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from builder.data.masked_shards import COUNTED, LAST, Shard
from builder.data.packed_batches import WHOLE, RowSampler, Share, training_dataset, validation_dataset
from builder.recipe import TrainingRecipe
from serving.errors import InputError

if TYPE_CHECKING:
    import tensorflow as tf

_CHUNK = 1 << 22
Batch = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]


class DocumentRows:
    """The documents of a shard that have a counted target among their first `sequence_length` + 1 tokens.

    Memory holds 16 bytes a document.

    Attributes:
        starts, lengths: of each row in the shard, int64 [rows]; a length is `sequence_length` + 1 at most.
        documents: documents of the shard, including those that make no row.
        truncated: rows whose document is longer.
    """

    def __init__(self, shard: Shard, sequence_length: int) -> None:
        self.shard, self.width = shard, sequence_length + 1
        starts = np.concatenate([[0], _document_ends(shard) + 1])
        whole = np.diff(starts)
        lengths = np.minimum(whole, self.width)
        if shard.mask is None:
            counted = lengths - 1
        else:
            mask = shard.mask
            counted = np.array(
                [
                    int((mask[start + 1 : start + length] & COUNTED).sum())
                    for start, length in zip(starts[:-1].tolist(), lengths.tolist(), strict=True)
                ],
                np.int64,
            )
        chosen = counted > 0
        self.documents = len(whole)
        self.starts, self.lengths = starts[:-1][chosen], lengths[chosen]
        self.truncated = int((whole[chosen] > self.width).sum())

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, rows: NDArray[np.int64], own: Any = slice(None)) -> Batch:
        """Inputs, targets and weights (0 or 1) of these rows, each [rows, sequence]; padded on the right with 0.

        The inputs and targets are those of the rows `own` among them alone.
        """
        within = np.arange(self.width)
        inside = within < self.lengths[rows][:, None]
        places = np.where(inside, self.starts[rows][:, None] + within, 0)
        tokens = np.where(inside[own], self.shard.ids[places[own]], 0).astype(np.int32)
        if self.shard.mask is not None:
            inside &= (self.shard.mask[places] & COUNTED).astype(bool)
        return tokens[:, :-1], tokens[:, 1:], inside[:, 1:].astype(np.float32)


class DocumentSampler:
    """Rows of one document each, a pure function of (seed, step): a new order in each epoch, rows numbered through."""

    def __init__(self, documents: DocumentRows, batch_size: int, seed: int) -> None:
        if not len(documents):
            raise InputError(
                "no training document has a counted token in its first training.sequence_length + 1; raise that"
            )
        self._documents, self._batch_size, self._seed = documents, batch_size, seed
        self.rows = len(documents)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def weighted_batch(self, step: int, own: Any = slice(None)) -> Batch:
        """Inputs and targets of the rows `own` of a step, and the weights of all its rows."""
        return self._documents.batch(self._numbers(step), own)

    def starts(self, step: int) -> NDArray[np.int64]:
        """Where a step's rows begin in the token stream, int64 [batch]."""
        starts: NDArray[np.int64] = self._documents.starts[self._numbers(step)]
        return starts

    def _numbers(self, step: int) -> NDArray[np.int64]:
        found = np.empty(self._batch_size, np.int64)
        for index in range(self._batch_size):
            epoch, number = divmod(step * self._batch_size + index, self.rows)
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = np.random.default_rng([self._seed, epoch]).permutation(self.rows)
            found[index] = self._order[number]
        return found


class MaskedSampler(RowSampler):
    """The rows of `RowSampler` with the weights of their targets."""

    def __init__(self, shard: Shard, sequence_length: int, batch_size: int, seed: int) -> None:
        super().__init__(shard.ids, sequence_length, batch_size, seed)
        self._shard, self._columns = shard, np.arange(sequence_length + 1)

    def weighted_batch(self, step: int, own: Any = slice(None)) -> Batch:
        """Inputs and targets of the rows `own` of a step, and the weights of all its rows."""
        mask = self._shard.mask
        places = (self.starts(step)[:, None] + self._columns) % len(self._shard.ids)
        rows = self._shard.ids[places[own]].astype(np.int32)
        counted = np.ones(places.shape, bool) if mask is None else (mask[places] & COUNTED).astype(bool)
        return rows[:, :-1], rows[:, 1:], counted[:, 1:].astype(np.float32)


def is_plain(shard: Shard, recipe: TrainingRecipe) -> bool:
    """Whether every target of every row counts, so that there are no weights in training."""
    return shard.mask is None and recipe.packing == "stream"


def make_sampler(shard: Shard, recipe: TrainingRecipe, seed: int) -> RowSampler | DocumentSampler:
    """The rows of a recipe's batches."""
    length, size = recipe.sequence_length, recipe.batch_size
    if recipe.packing == "rows":
        return DocumentSampler(DocumentRows(shard, length), size, seed)
    return RowSampler(shard.ids, length, size, seed) if shard.mask is None else MaskedSampler(shard, length, size, seed)


def training_batches(
    shard: Shard, recipe: TrainingRecipe, *, seed: int, steps: int, start_step: int = 0, share: Share = WHOLE
) -> tf.data.Dataset:
    """Return a dataset of the calls of steps `start_step` to `steps` - 1, `recipe.accumulation` of them a step.

    They hold the `share` of each part's rows: (inputs, targets), int32 [rows, sequence], or with weights, float32 of
    the same shape, where not all targets count. A weight is then k / W for a step of k calls and W counted targets in
    all: the sum of a call's losses by these weights, averaged over the k calls as gradients are accumulated, is the
    mean over the step's counted targets, however they fall on its parts. Where W is 0, all weights are.
    """
    parts, length = recipe.accumulation, recipe.sequence_length
    size = recipe.batch_size // parts
    if is_plain(shard, recipe):
        # Rows are numbered through, so the parts of a batch are batches of the smaller size.
        return training_dataset(
            shard.ids,
            sequence_length=length,
            batch_size=size,
            seed=seed,
            steps=steps * parts,
            start_step=start_step * parts,
            share=share,
        )
    sampler = make_sampler(shard, recipe, seed)
    assert not isinstance(sampler, RowSampler) or isinstance(sampler, MaskedSampler)

    own = np.arange(recipe.batch_size).reshape(parts, size)[:, share.rows(size)]

    def generate() -> Iterator[Batch]:
        for step in range(start_step, steps):
            inputs, targets, weights = sampler.weighted_batch(step, own.ravel())
            weights *= np.float32(parts / max(1.0, float(weights.sum())))
            shape = (*own.shape, length)
            yield from zip(inputs.reshape(shape), targets.reshape(shape), weights[own], strict=True)

    return _dataset(generate, (own.shape[1], length), max(0, steps - start_step) * parts)


def validation_batches(shard: Shard, recipe: TrainingRecipe, share: Share = WHOLE) -> tf.data.Dataset:
    """Return a dataset of (inputs, targets, weights of 0 and 1) that has each counted target once over all shares.

    Packed as a stream, as `packed_batches.validation_dataset`; with one document a row, in the order of the
    documents, each cut as in training.
    """
    length, size = recipe.sequence_length, recipe.batch_size // recipe.accumulation
    if is_plain(shard, recipe):
        return validation_dataset(shard.ids, sequence_length=length, batch_size=size, share=share)
    own = share.rows(size)
    shape = (own.stop - own.start, length)
    if recipe.packing == "rows":
        rows = DocumentRows(shard, length)

        def documents() -> Iterator[Batch]:
            for start in range(own.start, own.start + len(rows), size):
                batch = rows.batch(np.arange(min(start, len(rows)), min(start + shape[0], len(rows))))
                padding = ((0, shape[0] - len(batch[0])), (0, 0))
                yield np.pad(batch[0], padding), np.pad(batch[1], padding), np.pad(batch[2], padding)

        return _dataset(documents, shape, -(-len(rows) // size))

    mask = shard.mask
    assert mask is not None

    def stream() -> Iterator[Batch]:
        first, count = own.start * length, shape[0] * length
        for start in range(first, first + len(shard.ids) - 1, size * length):
            ids = shard.ids[start : start + count + 1].astype(np.int32)
            counted = (mask[start : start + count + 1] & COUNTED).astype(np.float32)
            padding = (0, count + 1 - len(ids))
            ids, counted = np.pad(ids, padding), np.pad(counted, padding)
            yield ids[:-1].reshape(shape), ids[1:].reshape(shape), counted[1:].reshape(shape)

    return _dataset(stream, shape, -(-(len(shard.ids) - 1) // (size * length)))


def counted_targets(shard: Shard, recipe: TrainingRecipe) -> NDArray[np.bool_]:
    """Return which tokens are targets that count in some row, bool [count]."""
    counted = np.ones(len(shard.ids), np.bool_) if shard.mask is None else (shard.mask & COUNTED).astype(np.bool_)
    if recipe.packing == "rows":
        rows = DocumentRows(shard, recipe.sequence_length)
        # How many rows hold a place, by where they begin and end.
        change = np.zeros(len(counted) + 1, np.int8)
        change[rows.starts + 1] += 1
        np.subtract.at(change, rows.starts + rows.lengths, 1)
        counted &= np.cumsum(change[:-1], dtype=np.int8) > 0
    elif len(counted):
        counted[0] = False  # It has no predecessor.
    return counted


def first_prompts(shard: Shard, count: int) -> list[list[int]]:
    """The ids before the first counted token of the first documents of a masked shard."""
    assert shard.mask is not None
    prompts = []
    for start in np.concatenate([[0], _document_ends(shard)[: count - 1] + 1]).tolist():
        mask = shard.mask[start : start + _CHUNK]
        length = int(np.argmax(mask & COUNTED)) if len(mask) else 0
        if length:
            prompts.append(shard.ids[start : start + length].tolist())
    return prompts


def describe_loss(sides: list[Shard], recipe: TrainingRecipe) -> dict[str, dict[str, int]]:
    """Return what the loss counts of the training and the validation side; nothing where it counts every target.

    Raises InputError if a side has no counted target, or the training side not even one row.
    """
    make_sampler(sides[0], recipe, seed=0)
    if is_plain(sides[0], recipe):
        return {}
    found = {}
    for name, shard in zip(("train", "validation"), sides, strict=True):
        counted = int(counted_targets(shard, recipe).sum())
        if not counted:
            raise InputError(
                f"corpus: no token of the {name} text is counted by the loss; raise training.sequence_length or add "
                "documents in corpus.paths"
            )
        found[name] = {"tokens": len(shard.ids), "counted_tokens": counted}
        if recipe.packing == "rows":
            rows = DocumentRows(shard, recipe.sequence_length)
            found[name] |= {
                "truncated_documents": rows.truncated,
                "documents_without_counted_tokens": rows.documents - len(rows),
                "padding_tokens": len(rows) * recipe.sequence_length - int((rows.lengths - 1).sum()),
            }
    return found


def _document_ends(shard: Shard) -> NDArray[np.int64]:
    """The place of each document's last token."""
    found = [np.empty(0, np.int64)]
    for start in range(0, len(shard.ids), _CHUNK):
        piece = slice(start, start + _CHUNK)
        last = shard.ids[piece] == shard.end_token if shard.mask is None else (shard.mask[piece] & LAST) > 0
        found.append(np.flatnonzero(last) + start)
    return np.concatenate(found)


def _dataset(generate: Any, shape: tuple[int, int], batches: int) -> tf.data.Dataset:
    from builder.keras_backend import tf

    spec = tf.TensorSpec(shape, tf.int32)
    signature = (spec, spec, tf.TensorSpec(shape, tf.float32))
    dataset = tf.data.Dataset.from_generator(generate, output_signature=signature)
    return dataset.apply(tf.data.experimental.assert_cardinality(batches)).prefetch(2)
