"""A model of random weights with a real vocabulary of several hundred words, for tests of structured output."""

from __future__ import annotations

import functools
import textwrap

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from serving.backends.base import FloatArray, IntArray
from serving.engine.config import EngineConfig
from serving.engine.engine import SlotEngine
from serving.sampling.grammars import GrammarCompiler
from tests.closed_form import END, ClosedFormSlotBackend

TEXT = '{"name": "Ann", "tags": ["red", "blue é"], "age": 31, "ok": true, "none": null}\n' + str(textwrap.__doc__)
SIZE = 640
"""Of the model's vocabulary, the last ids of which no token has."""
LENGTH = 1024


@functools.cache
def tokenizer() -> Tokenizer:
    """A byte-level BPE, the end token first, of fewer entries than SIZE."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - 40, special_tokens=[END], initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    made.train_from_iterator([TEXT * 3, *(str(each.__doc__) for each in (str, dict, list, int, np.ndarray))], trainer)
    assert 300 < made.get_vocab_size() < SIZE
    return made


@functools.cache
def compiler() -> GrammarCompiler:
    """The compiler of its grammars."""
    return GrammarCompiler(tokenizer(), SIZE, 0)


class RandomSlotBackend(ClosedFormSlotBackend):
    """Logits from the last two tokens, through random matrices."""

    def __init__(self, slots: int = 8, max_length: int = LENGTH) -> None:
        super().__init__(slots, max_length, 16, vocab_size=SIZE)
        self._weights = np.random.default_rng(7).normal(0, 1.5, (2, SIZE, SIZE)).astype(np.float32)

    def _logits(self, slot: int, length: int) -> FloatArray:
        last, before = self._tokens[slot, length - 1], self._tokens[slot, max(length - 2, 0)]
        logits: FloatArray = self._weights[0, last] + self._weights[1, before]
        return logits

    def decode(self, tokens: IntArray, lengths: IntArray) -> FloatArray:
        self.calls.clear()
        return super().decode(tokens, lengths)


def open_engine(slots: int = 8, start: bool = True, **config: int) -> SlotEngine:
    """An engine over it."""
    return SlotEngine(RandomSlotBackend(slots), tokenizer(), 0, EngineConfig(slots=slots, **config), start=start)
