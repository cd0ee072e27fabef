"""The n-gram baselines against their definitions, written out slowly."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from builder.data.ngram_baselines import KneserNeyTrigram, trigram_perplexity, unigram_perplexity
from serving.errors import InputError


def zipf(seed: int, count: int, vocab_size: int) -> np.ndarray:
    """Tokens with short-range structure, so that all orders matter: each copies the one two before, or is drawn."""
    random = np.random.default_rng(seed)
    drawn = np.minimum(random.zipf(1.3, count) - 1, vocab_size - 1)
    for place in range(2, count):
        if random.random() < 0.5:
            drawn[place] = (drawn[place - 2] * 3 + drawn[place - 1]) % vocab_size
    return drawn.astype(np.uint16)


class SlowKneserNey:
    """Chen and Goodman (1998) equation by equation, with dictionaries."""

    def __init__(self, tokens: list[int], vocab_size: int) -> None:
        trigrams = Counter(zip(tokens, tokens[1:], tokens[2:], strict=False))
        bigrams = Counter((v, w) for _, v, w in trigrams)
        unigrams = Counter((w,) for _, w in bigrams)
        self.vocab_size = vocab_size
        self.orders = [self.order(counts) for counts in (unigrams, bigrams, trigrams)]

    @staticmethod
    def order(counts: Counter) -> tuple:
        n = Counter(counts.values())
        y = n[1] / (n[1] + 2 * n[2])
        discounts = [0.0] + [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
        followers = defaultdict(list)
        for gram, count in counts.items():
            followers[gram[:-1]].append(count)
        return counts, discounts, followers

    def probability(self, context: tuple[int, ...], token: int) -> float:
        counts, discounts, followers = self.orders[len(context)]
        lower = self.probability(context[1:], token) if context else 1 / self.vocab_size
        if context not in followers:
            return lower
        total = sum(followers[context])
        saved = sum(discounts[min(count, 3)] for count in followers[context])
        count = counts[(*context, token)]
        return max(count - discounts[min(count, 3)], 0) / total + saved / total * lower


def test_trigram_is_the_definition() -> None:
    train, validation = zipf(1, 4000, 900), zipf(2, 500, 900)
    slow = SlowKneserNey(train.tolist(), 900)
    tokens = validation.tolist()
    logs = [math.log(slow.probability((tokens[0],), tokens[1]))]
    logs += [math.log(slow.probability((tokens[k - 2], tokens[k - 1]), tokens[k])) for k in range(2, len(tokens))]
    assert trigram_perplexity(train, validation, 900) == pytest.approx(math.exp(-sum(logs) / len(logs)), rel=1e-9)


@pytest.mark.parametrize("count", [0, 2, 3, 50, 3000])
def test_every_conditional_distribution_sums_to_one(count: int) -> None:
    vocab_size = 80
    train = zipf(3, count, vocab_size - 10)  # The last ten ids are never seen.
    model = KneserNeyTrigram(train, vocab_size)
    every = np.arange(vocab_size)
    contexts = [(75, 76), (0, 77), (77, 0), *zip(train[:20].tolist(), train[1:21].tolist(), strict=False)]
    contexts += [(int(u), int(v)) for u, v in np.random.default_rng(4).integers(0, vocab_size, (20, 2))]
    for u, v in contexts:
        for distribution in (
            model.trigram(np.full(vocab_size, u), np.full(vocab_size, v), every),
            model.bigram(np.full(vocab_size, v), every),
            model.unigram(every),
        ):
            assert distribution.min() > 0
            assert distribution.sum() == pytest.approx(1, abs=1e-12)


def test_unigram_is_the_definition() -> None:
    train, validation = np.array([0, 0, 1, 3]), np.array([2, 0, 2])
    # Of the vocabulary of 5: p(0) = 3/9, p(2) = 1/9; the first validation token is not scored.
    assert unigram_perplexity(train, validation, 5) == pytest.approx(math.sqrt(27))


def test_perplexity_of_what_has_no_pattern_is_about_the_vocabulary() -> None:
    random = np.random.default_rng(6)
    train, validation = random.integers(0, 50, 100_000), random.integers(0, 50, 5000)
    assert unigram_perplexity(train, validation, 50) == pytest.approx(50, rel=0.01)
    assert 50 < trigram_perplexity(train, validation, 50) < 55


def test_more_context_helps_where_there_is_structure() -> None:
    train, validation = zipf(7, 50_000, 300), zipf(8, 5000, 300)
    assert trigram_perplexity(train, validation, 300) < 0.7 * unigram_perplexity(train, validation, 300)


def test_keys_of_a_large_vocabulary_do_not_overflow() -> None:
    vocab_size = 1_000_000
    tokens = np.array([999_999, 999_998, 999_999, 5] * 50)
    assert trigram_perplexity(tokens, tokens, vocab_size) < 3


def test_two_validation_tokens_are_enough_and_one_is_not() -> None:
    train = zipf(9, 500, 20)
    assert math.isfinite(trigram_perplexity(train, train[:2], 20))
    for perplexity in (unigram_perplexity, trigram_perplexity):
        with pytest.raises(InputError, match="has 1 tokens and a perplexity needs 2"):
            perplexity(train, train[:1], 20)
        with pytest.raises(InputError, match="outside the vocabulary of 5"):
            perplexity(np.array([1, 2, 7]), train[:2], 5)
    with pytest.raises(InputError, match="vocabularies up to"):
        trigram_perplexity(train, train, 1 << 22)
