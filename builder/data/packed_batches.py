"""Rows cut from a stream of packed tokens, and the tf.data pipelines that feed them to training and validation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from serving.errors import InputError

if TYPE_CHECKING:
    import tensorflow as tf


@dataclass(frozen=True)
class Share:
    """Which rows of each batch this process reads, where `count` workers share them: as many rows each, in order."""

    index: int = 0
    count: int = 1

    def rows(self, batch_size: int) -> slice:
        """The rows of a batch of `batch_size`, which `count` divides."""
        size = batch_size // self.count
        return slice(self.index * size, (self.index + 1) * size)


WHOLE = Share()


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
    not overlap, in a random order; so rows differ from epoch to epoch and no token is favored. Rows are numbered
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

    def batch(self, step: int, own: slice = slice(None)) -> NDArray[np.int32]:
        """Return the rows `own` of a step, int32 [rows, sequence + 1]: inputs are all but the last column, targets
        all but the first."""
        places = (self.starts(step)[own, None] + self._within) % len(self._tokens)
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
    tokens: NDArray[Any],
    *,
    sequence_length: int,
    batch_size: int,
    seed: int,
    steps: int,
    start_step: int = 0,
    share: Share = WHOLE,
) -> tf.data.Dataset:
    """Return a tf.data.Dataset of (inputs, targets), int32 [rows, sequence_length] each, targets one token on.

    The rows are the `share` of each batch. It gives steps `start_step` to `steps` - 1. Step k is a pure function of
    (seed, k), so a resumed run sees what an unbroken one would have (see `RowSampler`). Raises InputError if there are
    fewer tokens than one row needs.
    """
    from builder.keras_backend import tf

    sampler, own = RowSampler(tokens, sequence_length, batch_size, seed), share.rows(batch_size)

    def generate() -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        for step in range(start_step, steps):
            rows = sampler.batch(step, own)
            yield rows[:, :-1], rows[:, 1:]

    spec = tf.TensorSpec((batch_size // share.count, sequence_length), tf.int32)
    dataset = tf.data.Dataset.from_generator(generate, output_signature=(spec, spec))
    return dataset.apply(tf.data.experimental.assert_cardinality(max(0, steps - start_step))).prefetch(2)


def validation_dataset(
    tokens: NDArray[Any], *, sequence_length: int, batch_size: int, share: Share = WHOLE
) -> tf.data.Dataset:
    """Return a tf.data.Dataset of (inputs, targets, weights), [rows, sequence_length], int32, int32, float32.

    The rows are the `share` of each batch. Over all shares, every token but the first, which has no predecessor, is a
    target of weight 1 exactly once, in the order of the stream; the rest of the last row and batch is padding of id 0
    and weight 0. A row sees nothing of the row before. Raises InputError if there are fewer than 2 tokens.
    """
    from builder.keras_backend import tf

    if len(tokens) < 2:
        raise InputError(
            f"the validation text has {len(tokens)} tokens and needs at least 2; "
            "add text in corpus.paths or raise corpus.validation_fraction"
        )
    targets = len(tokens) - 1
    per_batch = batch_size * sequence_length
    batches = -(-targets // per_batch)
    own = share.rows(batch_size)
    shape = (own.stop - own.start, sequence_length)
    first, size = own.start * sequence_length, shape[0] * sequence_length

    def generate() -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
        for start in range(first, first + targets, per_batch):
            # At the end of the stream, a share may have no target or not even a token.
            piece = tokens[start : start + size + 1].astype(np.int32)
            padded = np.pad(piece, (0, size + 1 - len(piece)))
            counted = max(0, len(piece) - 1)
            weights = np.pad(np.ones(counted, np.float32), (0, size - counted))
            yield padded[:-1].reshape(shape), padded[1:].reshape(shape), weights.reshape(shape)

    spec = tf.TensorSpec(shape, tf.int32)
    signature = (spec, spec, tf.TensorSpec(shape, tf.float32))
    dataset = tf.data.Dataset.from_generator(generate, output_signature=signature)
    return dataset.apply(tf.data.experimental.assert_cardinality(batches)).prefetch(2)
