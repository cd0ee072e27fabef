"""Perplexity of a text by a sliding window, from a bundle's Keras weights or through a graph as it is served."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builder.data.file_readers import has_fields
from builder.data.masked_shards import COUNTED, encode_document
from builder.data.sources import find_sources, read_sources
from builder.data.tokenizer import load_tokenizer
from builder.data.transforms import load_transform
from builder.model.geometry import read_geometry
from builder.recipe import CorpusRecipe, InstructionRecipe
from builder.special_tokens import read_token_ids
from builder.verification.logit_parity import token_losses
from builder.verification.paired_loss import perplexity_interval
from serving.backends.base import Backend
from serving.backends.loader import load_backend
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


Losses = Callable[[NDArray[np.int32], int], NDArray[np.float64]]
"""Of rows of ids [rows, length + 1], the negative log-likelihoods (nats) of tokens number first + 1 and later."""


def model_losses(model: Any) -> Losses:
    """The losses of a Keras GPT-2 in float32, by whole passes."""
    from builder.keras_backend import tf

    @tf.function  # type: ignore[untyped-decorator]
    def losses(inputs: Any, targets: Any) -> Any:
        return tf.nn.sparse_softmax_cross_entropy_with_logits(targets, model(inputs, training=False))

    def of(rows: NDArray[np.int32], first: int) -> NDArray[np.float64]:
        found: NDArray[Any] = losses(tf.constant(rows[:, :-1]), tf.constant(rows[:, 1:])).numpy()
        return found[:, first:].astype(np.float64)

    return of


def backend_losses(backend: Backend) -> Losses:
    """The losses of a runtime as it serves: a prefill of the context, then a step for each token."""

    def of(rows: NDArray[np.int32], first: int) -> NDArray[np.float64]:
        length = rows.shape[1] - 1
        state, logits = backend.prefill(rows[:, : first + 1].tolist(), length)
        found = [token_losses(logits, rows[:, first + 1])]
        for place in range(first + 1, length):
            logits = backend.decode(state, rows[:, place].astype(np.int64))
            found.append(token_losses(logits, rows[:, place + 1]))
        return np.stack(found, axis=1)

    return of


def score(
    losses: Losses, ids: NDArray[np.int32], window: int, stride: int, counted: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Return the negative log-likelihoods, in nats, of the tokens of `ids` [count] by `windows`, in their order.

    `counted` [count] says which tokens are scored; all but the first are if it is None.
    """
    places = list(windows(len(ids), window, stride))
    scored = []
    padded = np.pad(ids, (0, window + 1))
    for start in range(0, len(places), _BATCH):
        batch = places[start : start + _BATCH]
        batch += [batch[-1]] * (_BATCH - len(batch))  # One shape, one trace; the copies are not counted.
        rows = np.stack([padded[begin : begin + window + 1] for begin, _ in batch])
        earliest = min(first for _, first in batch)
        found = losses(rows, earliest)
        for row, (begin, first) in enumerate(places[start : start + _BATCH]):
            last = min(window, len(ids) - 1 - begin)
            chosen = slice(None) if counted is None else counted[begin + 1 + first : begin + 1 + last]
            scored.append(found[row, first - earliest : last - earliest][chosen])
    return np.concatenate(scored)


def read_ids(
    folder: Path,
    text: str,
    text_field: str = "text",
    instruction: InstructionRecipe | None = None,
    transform: str = "",
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Token ids of the documents at `text` (file, folder or glob), each followed by the end token, as one stream.

    Also which of them are scored [count]: with an `instruction`, those of responses, unless all files are .txt or .md.
    `transform` names a function that each text goes through first (`load_transform`). Raises InputError if no token is
    scored.
    """
    tokenizer, end = load_tokenizer(folder), read_token_ids(folder).eos
    sources = find_sources([text], "--text")
    if instruction is None or not any(has_fields(source.path) for source in sources.files):
        instruction = InstructionRecipe()
    step = load_transform(transform, "--transform") if transform else None
    encoded = [
        encode_document((document.mapped(step) if step else document).ended(), tokenizer, end)
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


def chosen_transform(bundle: Bundle, given: str | None) -> str:
    """Return the transform that `--transform` names, empty for none.

    Raises InputError if nothing was given and the bundle's texts went through one: the manifest's word alone imports
    and runs no code.
    """
    if given is not None:
        return "" if given == "none" else given
    recorded = bundle.manifest.provenance.recipe.get("corpus", {}).get("transform")
    if recorded:
        raise InputError(
            f"{bundle.folder}: its texts went through corpus.transform; give --transform {recorded} to run that "
            "function on this text too, or --transform none to score the text as it is"
        )
    return ""


def open_graph(bundle: Bundle, name: str) -> Backend:
    """Load a bundle's graph by name ("ort/int8", "onnx/portable", or "savedmodel") to measure what it serves.

    Raises InputError for a name that the bundle does not have, and for a graph that gives no logits.
    """
    if name == "savedmodel":
        return load_backend(bundle, "tensorflow")
    graph = bundle.graph(name)
    if graph.runtime == "tensorflow":
        raise InputError(f"--graph {name}: one signature of the SavedModel; name 'savedmodel'")
    if graph.cache == "none":
        raise InputError(f"--graph {name}: it chooses tokens and has no weights; name a graph such as 'ort/fp32'")
    return load_backend(bundle, "onnx", name)


def evaluate_bundle(
    folder: Path,
    text: str,
    *,
    window: int | None = None,
    stride: int | None = None,
    text_field: str = "text",
    instruction: InstructionRecipe | None = None,
    transform: str = "",
    backend: Backend | None = None,
) -> dict[str, Any]:
    """Return perplexity, loss (nats a token), tokens scored, window and stride of a bundle on a text.

    With a `backend`, of one of the bundle's graphs, they are what it serves, and there are also the Keras weights'
    `reference_perplexity`, `perplexity_relative` to it, and the 95 % interval of that.

    With an `instruction`, the text is records, and the tokens of their responses alone are scored. `transform` names
    the function that each text goes through first.

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
    ids, counted = read_ids(folder, text, text_field, instruction, transform)
    reference = score(model_losses(load_model(folder)), ids, window, stride, counted)
    found = reference if backend is None else score(backend_losses(backend), ids, window, stride, counted)
    loss = float(found.mean())
    record: dict[str, Any] = {
        "perplexity": math.exp(loss),
        "loss": loss,
        "tokens": len(found),
        "window": window,
        "stride": stride,
    }
    if backend is not None:
        difference = found - reference
        record |= {
            "reference_perplexity": math.exp(float(reference.mean())),
            "perplexity_relative": math.expm1(float(difference.mean())),
            "perplexity_relative_interval": perplexity_interval(difference),
        }
    return record
