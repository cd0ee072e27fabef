"""What a model must beat: unigram and trigram perplexities on the very tokens that it is validated on.

Both score every validation token but the first, which are the targets of `packed_batches.validation_dataset`. The
trigram sees the two tokens before, the second validation token only the one there is. A document's end is just its end
token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.errors import InputError

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]
# Which tokens of the training and of the validation text are targets; None where all are.
Counted = tuple[NDArray[np.bool_], NDArray[np.bool_]] | None
# Cubed, it still fits the 63 bits of a trigram's key.
_LARGEST_VOCABULARY = 1 << 21


def unigram_perplexity(
    train: NDArray[Any], validation: NDArray[Any], vocab_size: int, counted: Counted = None
) -> float:
    """Return the perplexity of `validation` [m] under token frequencies of `train` [n], add-one smoothed.

    exp of the mean negative log-likelihood in nats, p(w) = (count(w) + 1) / (n + vocab_size), over all validation
    tokens but the first. Raises InputError for fewer than 2 validation tokens or an id outside the vocabulary.

    `counted` (bool [n], bool [m]) leaves the other tokens of both out of the counts and of the mean.
    """
    train, validation = _checked(train, vocab_size), _checked(validation, vocab_size, at_least=2)
    scored = validation[1:]
    if counted is not None:
        train, scored = train[counted[0]], scored[counted[1][1:]]
    counts = np.bincount(train, minlength=vocab_size)
    probabilities = (counts + 1) / (len(train) + vocab_size)
    return float(np.exp(-np.log(probabilities[scored]).mean()))


def trigram_perplexity(
    train: NDArray[Any], validation: NDArray[Any], vocab_size: int, counted: Counted = None
) -> float:
    """Return the perplexity of `validation` [m] under an interpolated modified Kneser-Ney trigram of `train` [n].

    exp of the mean negative log-likelihood in nats over all validation tokens but the first; the second is scored by
    the model's bigram level, for want of a longer past. Memory is some 100 bytes a training token. Raises InputError
    for fewer than 2 validation tokens or an id outside the vocabulary.

    `counted` (bool [n], bool [m]) says which tokens are predicted, in both; the others are only seen as pasts.
    """
    model = KneserNeyTrigram(train, vocab_size, None if counted is None else counted[0])
    validation = _checked(validation, vocab_size, at_least=2)
    second = model.bigram(validation[:1], validation[1:2])
    rest = model.trigram(validation[:-2], validation[1:-1], validation[2:])
    found = np.concatenate([second, rest])
    return float(np.exp(-np.log(found if counted is None else found[counted[1][1:]]).mean()))


@dataclass(frozen=True)
class _Level:
    """The discounted counts of one order: n-grams and contexts by sorted key, a context being a key without its last
    token (key // vocab_size)."""

    grams: _Ints
    discounted: _Floats
    contexts: _Ints
    totals: _Floats
    backoff: _Floats

    @classmethod
    def of(cls, grams: _Ints, counts: _Ints, vocab_size: int) -> _Level:
        discounts = _discounts(counts)[np.minimum(counts, 3)]
        contexts, starts = np.unique(grams // vocab_size, return_index=True)
        if not len(contexts):
            nothing = np.empty(0)
            return cls(grams, nothing, contexts, nothing, nothing)
        totals = np.add.reduceat(counts, starts).astype(np.float64)
        return cls(grams, counts - discounts, contexts, totals, np.add.reduceat(discounts, starts) / totals)

    def interpolate(self, keys: _Ints, vocab_size: int, lower: _Floats) -> _Floats:
        """p(last token | context) of each key, given the same of the next lower order."""
        gram, has_gram = _find(self.grams, keys)
        context, has_context = _find(self.contexts, keys // vocab_size)
        result = lower.copy()
        result[has_context] *= self.backoff[context[has_context]]
        result[has_gram] += self.discounted[gram[has_gram]] / self.totals[context[has_gram]]
        return result


class KneserNeyTrigram:
    """Interpolated modified Kneser-Ney smoothing (Chen and Goodman, 1998, TR-10-98, section 3 and appendix).

    The trigram order counts occurrences; the bigram order counts the distinct tokens before each bigram, the unigram
    order the distinct tokens before each token, interpolated with the uniform distribution. Each order has its own
    discounts for counts of one, two, and three or more. For any context, seen or not, the probabilities sum to 1.
    """

    def __init__(self, train: NDArray[Any], vocab_size: int, counted: NDArray[np.bool_] | None = None) -> None:
        tokens = _checked(train, vocab_size)
        size = self._size = vocab_size
        keys = (tokens[:-2] * size + tokens[1:-1]) * size + tokens[2:]
        trigrams, counts = np.unique(keys if counted is None else keys[counted[2:]], return_counts=True)
        bigrams, bigram_counts = np.unique(trigrams % (size * size), return_counts=True)
        unigrams, unigram_counts = np.unique(bigrams % size, return_counts=True)
        self._trigrams = _Level.of(trigrams, counts, size)
        self._bigrams = _Level.of(bigrams, bigram_counts, size)
        self._unigrams = _Level.of(unigrams, unigram_counts, size)

    def unigram(self, w: _Ints) -> _Floats:
        """p(w) [k] from the lowest order, for ids w [k]."""
        return self._unigrams.interpolate(w, self._size, np.full(len(w), 1 / self._size))

    def bigram(self, v: _Ints, w: _Ints) -> _Floats:
        """p(w | v) [k] from the middle order, for ids v, w [k]."""
        return self._bigrams.interpolate(v * self._size + w, self._size, self.unigram(w))

    def trigram(self, u: _Ints, v: _Ints, w: _Ints) -> _Floats:
        """p(w | u, v) [k], for ids u, v, w [k]."""
        keys = (u * self._size + v) * self._size + w
        return self._trigrams.interpolate(keys, self._size, self.bigram(v, w))


def _discounts(counts: _Ints) -> _Floats:
    """The discounts of counts 0, 1, 2 and 3 or more: D_k = k - (k + 1) Y n_(k+1) / n_k with Y = n_1 / (n_1 + 2 n_2).

    Counts too few to estimate them, or that would give one outside (0, k], take 0.5, 1 and 1.5 instead, as is usual.
    """
    _, n1, n2, n3, n4 = (int(n) for n in np.bincount(np.minimum(counts, 5), minlength=6)[:5])
    if min(n1, n2, n3):
        y = n1 / (n1 + 2 * n2)
        found = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if (found[1:] > 0).all() and (found <= [0, 1, 2, 3]).all():
            return found
    return np.array([0.0, 0.5, 1.0, 1.5])


def _find(table: _Ints, keys: _Ints) -> tuple[_Ints, NDArray[np.bool_]]:
    """The place of each key in a sorted table, and whether it is there at all."""
    places = np.searchsorted(table, keys)
    inside = places < len(table)
    there = np.zeros(len(keys), np.bool_)
    there[inside] = table[places[inside]] == keys[inside]
    return places, there


def _checked(tokens: NDArray[Any], vocab_size: int, at_least: int = 0) -> _Ints:
    if vocab_size > _LARGEST_VOCABULARY:
        raise InputError(f"n-gram baselines count vocabularies up to {_LARGEST_VOCABULARY}, not {vocab_size}")
    if len(tokens) < at_least:
        raise InputError(
            f"the validation text has {len(tokens)} tokens and a perplexity needs {at_least}; add text in corpus.paths"
        )
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise InputError(
            f"the tokens run to id {int(tokens.max())}, outside the vocabulary of {vocab_size}; "
            "run 'gpt2-bundle prepare' again with one tokenizer"
        )
    return np.asarray(tokens, dtype=np.int64)
