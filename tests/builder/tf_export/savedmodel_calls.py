"""How tests call the signatures of a SavedModel: two ways to run it, and inputs from plain lists."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builder.keras_backend import tf
from serving.backends.tensorflow import SavedModelSession

Call = Callable[..., dict[str, Any]]
VOCABULARY = 256
CACHE = [f"cache_{layer}_{part}" for layer in range(2) for part in ("key", "value")]


def loaded_call(folder: str) -> Call:
    """A function from a signature's name and its inputs to its outputs, arrays by name, by `tf.saved_model.load`."""
    loaded = tf.saved_model.load(folder)

    def run(signature: str, **inputs: Any) -> dict[str, Any]:
        outputs = loaded.signatures[signature](**{key: tf.constant(value) for key, value in inputs.items()})
        return {key: value.numpy() for key, value in outputs.items()}

    return run


def session_call(folder: str) -> Call:
    """The same through a Session, as TensorFlow Serving does it."""
    return SavedModelSession(Path(folder)).run


def padded(prompts: list[list[int]], width: int = 0, garbage: np.random.Generator | None = None) -> dict[str, Any]:
    width = max(width, *map(len, prompts))
    ids = np.zeros((len(prompts), width), np.int32)
    if garbage is not None:
        ids[:] = garbage.integers(0, VOCABULARY, ids.shape)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    return {"token_ids": ids, "lengths": np.array([len(prompt) for prompt in prompts], np.int32)}


def columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Parameters of each row, with defaults, as the signature's inputs."""
    defaults = {
        "max_new_tokens": (16, np.int32),
        "temperature": (0.0, np.float32),
        "top_k": (0, np.int32),
        "top_p": (1.0, np.float32),
        "seed": (0, np.int64),
    }
    return {
        name: np.array([row.get(name, default) for row in rows], dtype) for name, (default, dtype) in defaults.items()
    }


def assert_refused(call: Call, sentence: str, signature: str, inputs: dict[str, Any]) -> None:
    """The call must fail as an invalid argument, in this sentence."""
    # Several times, since checks and computation run at once and the first to fail is heard.
    for _ in range(5):
        with pytest.raises(tf.errors.InvalidArgumentError) as caught:
            call(signature, **inputs)
        assert sentence in str(caught.value)
