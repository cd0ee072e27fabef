"""A bundle's SavedModel in TensorFlow, in this process, through the signatures that TensorFlow Serving would call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serving.backends.base import FloatArray, IntArray, check_capacity, check_room, pad_right
from serving.bundle import Bundle
from serving.bundle.private_copy import private_copy
from serving.errors import BundleError
from serving.protobuf.saved_model_ops import check_saved_model
from serving.support.tensorflow_import import tf

GRAPH = "savedmodel/prefill"


@dataclass
class TensorFlowState:
    """A batch of rows being decoded: their lengths so far, [rows], and the cache tensors by name."""

    lengths: IntArray
    capacity: int
    cache: dict[str, Any]


class SavedModelSession:
    """A SavedModel in a TensorFlow session of its own: the way in which TensorFlow Serving loads and runs one."""

    def __init__(self, folder: Path, name: Path | None = None) -> None:
        """Load the SavedModel in `folder`, which errors call `name`.

        Raises BundleError for what holds more than an export does, and for what TensorFlow cannot load.
        """
        check_saved_model(folder, name)
        self._session = tf.compat.v1.Session(graph=tf.Graph())
        try:
            with self._session.graph.as_default():
                loaded = tf.compat.v1.saved_model.load(self._session, [tf.saved_model.SERVING], str(folder))
        except Exception as error:  # Its errors share no narrower base.
            reason = " ".join(str(error).split())
            raise BundleError(f"{name or folder}: TensorFlow cannot load it: {reason}; export it again") from None
        self.signatures = {name: each for name, each in loaded.signature_def.items() if not name.startswith("__")}

    def run(self, signature: str, options: Any = None, **inputs: Any) -> dict[str, Any]:
        """Run a signature on numpy inputs by name and return its outputs by name.

        Raises tf.errors.InvalidArgumentError for what the signature refuses.
        """
        definition = self.signatures[signature]
        feeds = {definition.inputs[name].name: value for name, value in inputs.items()}
        fetches = {name: info.name for name, info in definition.outputs.items()}
        outputs: dict[str, Any] = self._session.run(fetches, feeds, options=options)
        return outputs


class TensorFlowBackend:
    """The SavedModel of a bundle, run by its `prefill` and `decode` signatures."""

    def __init__(self, bundle: Bundle) -> None:
        """Raises BundleError for a SavedModel that holds what no export does, before any of it runs."""
        geometry = bundle.manifest.model
        self.name = "savedmodel"
        self.vocab_size, self.n_positions = geometry.vocab_size, geometry.n_positions
        place = bundle.graph(GRAPH).path.rpartition("/")[0]
        with private_copy(bundle, place) as folder:
            check_saved_model(folder, bundle.folder / place)
            try:
                # Kept whole: signatures do not keep the variables that they read alive.
                self.loaded = tf.saved_model.load(str(folder))
            except Exception as error:  # Its errors share no narrower base.
                reason = " ".join(str(error).split())
                raise BundleError(f"{bundle.folder}: TensorFlow cannot load {place}: {reason}") from None
        self._prefill = self.loaded.signatures["prefill"]
        self._decode = self.loaded.signatures["decode"]

    def prefill(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[TensorFlowState, FloatArray]:
        """See `Backend.prefill`."""
        check_capacity(prompts, capacity, self.n_positions)
        token_ids, lengths = pad_right(prompts)
        outputs = self._prefill(
            token_ids=tf.constant(token_ids, tf.int32),
            lengths=tf.constant(lengths, tf.int32),
            capacity=tf.constant([capacity] * len(prompts), tf.int32),
        )
        logits: FloatArray = outputs.pop("logits").numpy()
        return TensorFlowState(lengths, capacity, outputs), logits

    def decode(self, state: TensorFlowState, tokens: IntArray) -> FloatArray:
        """See `Backend.decode`."""
        check_room(state.lengths, state.capacity)
        outputs = self._decode(
            token_ids=tf.constant(tokens, tf.int32), lengths=tf.constant(state.lengths, tf.int32), **state.cache
        )
        logits: FloatArray = outputs.pop("logits").numpy()
        state.cache = outputs
        state.lengths = state.lengths + 1
        return logits

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seeds: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Continue each prompt by the in-graph loop of `serving_default`; the end token, if reached, is included."""
        token_ids, lengths = pad_right(prompts)
        rows = len(prompts)
        outputs = self.loaded.signatures["serving_default"](
            token_ids=tf.constant(token_ids, tf.int32),
            lengths=tf.constant(lengths, tf.int32),
            max_new_tokens=tf.fill([rows], tf.constant(max_new_tokens, tf.int32)),
            temperature=tf.fill([rows], tf.constant(temperature, tf.float32)),
            top_k=tf.fill([rows], tf.constant(top_k, tf.int32)),
            top_p=tf.fill([rows], tf.constant(top_p, tf.float32)),
            seed=tf.constant(seeds or [0] * rows, tf.int64),
        )
        ids, made = outputs["token_ids"].numpy(), outputs["lengths"].numpy()
        return [row[:count].tolist() for row, count in zip(ids, made, strict=True)]

    def score(self, texts: Sequence[Sequence[int]]) -> list[FloatArray]:
        """Log-probability (nats) of each token given those before it, [len(text)] a text; 0 for the first."""
        token_ids, lengths = pad_right(texts)
        outputs = self.loaded.signatures["score"](
            token_ids=tf.constant(token_ids, tf.int32), lengths=tf.constant(lengths, tf.int32)
        )
        log_probs = np.asarray(outputs["log_probs"])
        return [row[:length] for row, length in zip(log_probs, lengths, strict=True)]
