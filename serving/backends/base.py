"""What every runtime offers: a prefill that opens a batch of sequences, and a decode step that extends all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


class Backend(Protocol):
    """One graph of one bundle, loaded in one runtime.

    The cache lives in the opaque state that `prefill` returns and `decode` advances; a state belongs to the backend
    that made it and is used by one thread at a time.
    """

    name: str
    vocab_size: int
    n_positions: int

    def prefill(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[Any, FloatArray]:
        """Run `prompts` (each of 1 to `capacity` token ids, lengths may differ) and return (state, logits).

        `capacity` is the number of positions each row may reach, at most `n_positions`. `logits` is
        [len(prompts), vocab_size] float32: each row's logits at its own last prompt token.
        """
        ...

    def decode(self, state: Any, tokens: IntArray) -> FloatArray:
        """Append one token id a row (`tokens` is [rows]) and return the logits after it, [rows, vocab_size].

        Raises InputError if a row is already at its capacity.
        """
        ...
