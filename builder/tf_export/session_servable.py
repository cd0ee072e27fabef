"""A SavedModel through TensorFlow's Session API: the way in which TensorFlow Serving loads and runs one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import builder.keras_backend  # noqa: F401 - chooses Keras's backend before TensorFlow is imported.
from serving.backends.base import pad_right
from serving.backends.tensorflow import SavedModelSession


class SessionServable(SavedModelSession):
    """One loaded SavedModel, which generates and tokenizes through its signatures."""

    def __init__(self, folder: Path) -> None:
        """Raises BundleError as `SavedModelSession` does."""
        super().__init__(folder)
        self._requests = itertools.count(1)

    def generate(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations by `serving_default`; the end token, if reached, is included."""
        token_ids, lengths = pad_right(prompts)
        outputs = self.run(
            "serving_default",
            token_ids=token_ids.astype(np.int32),
            lengths=lengths.astype(np.int32),
            **_greedy(len(prompts), max_new_tokens),
        )
        pairs = zip(outputs["token_ids"], outputs["lengths"], strict=True)
        return [row[:length].tolist() for row, length in pairs]

    def generate_by_slots(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]:
        """The same by `prefill_slots`, `decode_slots` and `release_slots`, as many prompts at once as find a slot."""
        texts: list[list[int]] = [[] for _ in prompts]
        waiting = list(range(len(prompts)))
        while waiting:
            token_ids, lengths = pad_right([prompts[row] for row in waiting])
            answer = self.run(
                "prefill_slots",
                request_id=np.array([next(self._requests) for _ in waiting], np.int64),
                token_ids=token_ids.astype(np.int32),
                lengths=lengths.astype(np.int32),
                **_greedy(len(waiting), max_new_tokens),
            )
            placed = np.flatnonzero(answer["status"] >= 0)
            if not len(placed):
                raise RuntimeError("no slot is free, though nothing else uses this servable")
            rows = [waiting[place] for place in placed]
            held = {name: answer[name][placed] for name in ("slot", "generation")}
            answer = {name: value[placed] for name, value in answer.items()}
            while True:
                for row, tokens, length in zip(rows, answer["token_ids"], answer["lengths"], strict=True):
                    texts[row] += tokens[:length].tolist()
                if (answer["status"] != 0).all():
                    break
                received = np.array([len(texts[row]) for row in rows], np.int32)
                answer = self.run("decode_slots", **held, received=received, steps=np.full(len(rows), 8, np.int32))
            self.run("release_slots", **held)
            waiting = [row for row in waiting if row not in rows]
        return texts

    def generate_text(self, texts: Sequence[str], *, max_new_tokens: int) -> list[str]:
        """Greedy continuations by the signature `generate_text`."""
        given = np.array([text.encode("utf-8") for text in texts], np.object_)
        outputs = self.run("generate_text", text=given, **_greedy(len(texts), max_new_tokens))
        return [text.decode("utf-8") for text in outputs["text"]]

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids by the signature `tokenize`."""
        outputs = self.run("tokenize", text=np.array([text.encode("utf-8") for text in texts], np.object_))
        pairs = zip(outputs["token_ids"], outputs["lengths"], strict=True)
        return [row[:length].tolist() for row, length in pairs]


def _greedy(rows: int, max_new_tokens: int) -> dict[str, Any]:
    return {
        "max_new_tokens": np.full(rows, max_new_tokens, np.int32),
        "temperature": np.zeros(rows, np.float32),
        "top_k": np.zeros(rows, np.int32),
        "top_p": np.ones(rows, np.float32),
        "seed": np.zeros(rows, np.int64),
    }
