"""Perplexity of a text by a sliding window, from a bundle's Keras weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builder.data.file_formats import has_fields
from builder.data.masked_shards import COUNTED, encode_document
from builder.data.sources import find_sources, read_sources
from builder.data.tokenizer import load_tokenizer
from builder.model.pretrained import read_geometry
from builder.recipe import CorpusRecipe, InstructionRecipe
from serving.bundle import Bundle
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


def score(
    model: Any, ids: NDArray[np.int32], window: int, stride: int, counted: NDArray[np.bool_] | None = None
) -> tuple[float, int]:
    """Return (sum of negative log-likelihoods in nats, tokens scored) of `ids` [count] by `windows`, in float32.

    `counted` [count] says which tokens are scored; all but the first are if it is None.
    """
    from builder.keras_backend import tf

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
            chosen = slice(None) if counted is None else counted[begin + 1 + first : begin + 1 + last]
            losses_here = found[row, first:last][chosen]
            total += float(losses_here.sum())
            scored += len(losses_here)
    return total, scored


def read_ids(
    folder: Path, text: str, text_field: str = "text", instruction: InstructionRecipe | None = None
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Token ids of the documents at `text` (file, folder or glob), each followed by the end token, as one stream.

    Also which of them are scored [count]: with an `instruction`, those of responses, unless all files are .txt or .md.
    Raises InputError if none is scored.
    """
    tokenizer = load_tokenizer(folder)
    sources = find_sources([text], "--text")
    if instruction is None or not any(has_fields(source.path) for source in sources.files):
        instruction = InstructionRecipe()
    encoded = [
        encode_document(document.ended(), tokenizer)
        for document in read_sources(sources, CorpusRecipe(text_field=text_field), instruction)
        if document.is_answered
    ]
    ids = np.concatenate([np.empty(0, np.int32), *(part for part, _ in encoded)]).astype(np.int32)
    counted = np.concatenate([np.empty(0, np.bool_), *((mask & COUNTED) > 0 for _, mask in encoded)])
    if not counted[1:].any():
        raise InputError(f"{text}: {len(ids)} tokens, none to score, and a perplexity needs one; name a text with more")
    return ids, counted


def instruction_of(bundle: Bundle) -> InstructionRecipe | None:
    """How the records that a bundle was trained on are read; None where they were plain text."""
    table = bundle.manifest.provenance.recipe.get("instruction", {})
    try:
        recipe = InstructionRecipe(**table)
    except TypeError:  # Written by a version with other keys.
        return None
    return recipe if recipe.is_set else None


def evaluate_bundle(
    folder: Path,
    text: str,
    *,
    window: int | None = None,
    stride: int | None = None,
    text_field: str = "text",
    instruction: InstructionRecipe | None = None,
) -> dict[str, float]:
    """Return perplexity, loss (nats a token), tokens scored, window and stride of a bundle on a text.

    With an `instruction`, the text is records, and the tokens of their responses alone are scored.

    `window` is the model's context by default, `stride` half of the window. Raises InputError for a window or stride
    out of bounds and for a text without words.
    """
    from builder.model.pretrained import load_model

    positions = read_geometry(folder).n_positions
    window = positions if window is None else window
    if not 1 <= window <= positions:
        raise InputError(f"--window {window}: the model reads from 1 to {positions} tokens; choose one of those")
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window:
        raise InputError(f"--stride {stride}: it must be from 1 to the window, {window}, or tokens would be left out")
    ids, counted = read_ids(folder, text, text_field, instruction)
    total, scored = score(load_model(folder), ids, window, stride, counted)
    loss = total / scored
    return {"perplexity": math.exp(loss), "loss": loss, "tokens": scored, "window": window, "stride": stride}
