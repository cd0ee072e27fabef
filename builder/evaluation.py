"""Perplexity of a text by a sliding window, from a bundle's Keras weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builder.base import read_geometry
from builder.sources import find_sources, read_sources
from builder.tokenizer import end_token_id, load_tokenizer
from serving.errors import InputError

_BATCH = 8


def windows(count: int, window: int, stride: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, first) of each pass over `count` tokens: it reads `window` tokens from `begin` on.

    It scores what follows each token from number `first` of the window on. Every token but the first of the stream is
    scored once, in the first window that holds its predecessor; after the first window that is with at least
    `window - stride + 1` tokens of context.
    """
    begin, scored = 0, 0
    while scored < count - 1:
        yield begin, scored - begin
        scored = begin + window
        begin += stride


def score(model: Any, ids: NDArray[np.int32], window: int, stride: int) -> tuple[float, int]:
    """Return (sum of negative log-likelihoods in nats, tokens scored) of `ids` [count] by `windows`, in float32."""
    from builder.frameworks import tf

    @tf.function  # type: ignore[untyped-decorator]
    def losses(inputs: Any, targets: Any) -> Any:
        return tf.nn.sparse_softmax_cross_entropy_with_logits(targets, model(inputs, training=False))

    places = list(windows(len(ids), window, stride))
    total, scored = 0.0, 0
    padded = np.pad(ids, (0, window + 1))
    for start in range(0, len(places), _BATCH):
        batch = places[start : start + _BATCH]
        batch += [batch[-1]] * (_BATCH - len(batch))  # One shape, one trace; the copies are not counted.
        rows = np.stack([padded[begin : begin + window + 1] for begin, _ in batch])
        found = losses(tf.constant(rows[:, :-1]), tf.constant(rows[:, 1:])).numpy().astype(np.float64)
        for row, (begin, first) in enumerate(places[start : start + _BATCH]):
            last = min(window, len(ids) - 1 - begin)
            total += float(found[row, first:last].sum())
            scored += last - first
    return total, scored


def read_ids(folder: Path, text: str, text_field: str = "text") -> NDArray[np.int32]:
    """Token ids of the documents at `text` (file, folder or glob), each followed by the end token, as one stream.

    Raises InputError if there are fewer than 2 tokens.
    """
    tokenizer = load_tokenizer(folder)
    end = end_token_id(tokenizer)
    ids: list[int] = []
    for document in read_sources(find_sources([text], "--text"), text_field):
        ids += [*tokenizer.encode(document.text, add_special_tokens=False).ids, end]
    if len(ids) < 2:
        raise InputError(f"{text}: {len(ids)} tokens, and a perplexity needs at least 2; name a text with words in it")
    return np.array(ids, np.int32)


def evaluate_bundle(
    folder: Path, text: str, *, window: int | None = None, stride: int | None = None, text_field: str = "text"
) -> dict[str, float]:
    """Return perplexity, loss (nats a token), tokens scored, window and stride of a bundle on a text.

    `window` is the model's context by default, `stride` half of the window. Raises InputError for a window or stride
    out of bounds and for a text without words.
    """
    from builder.export import load_model

    positions = read_geometry(folder).n_positions
    window = positions if window is None else window
    if not 1 <= window <= positions:
        raise InputError(f"--window {window}: the model reads from 1 to {positions} tokens; choose one of those")
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window:
        raise InputError(f"--stride {stride}: it must be from 1 to the window, {window}, or tokens would be left out")
    ids = read_ids(folder, text, text_field)
    total, scored = score(load_model(folder), ids, window, stride)
    loss = total / scored
    return {"perplexity": math.exp(loss), "loss": loss, "tokens": scored, "window": window, "stride": stride}
