"""What the certificate runs on: golden prompts and text, and the versions of the packages that decide the graphs."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builder.data.token_shards import open_tokens
from builder.onnx_export.precisions import PRECISIONS
from builder.recipe import VerifyRecipe

GOLDEN = "golden.json"
_PACKAGES = (
    "tensorflow",
    "keras",
    "tf2onnx",
    "onnx",
    "onnxruntime",
    "numpy",
    "tokenizers",
    "safetensors",
    "transformers",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a bundle's graphs are."""
    return {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}


def write_golden(
    recipe: VerifyRecipe, held_out: Path, n_positions: int, seed: int, path: Path, examples: Mapping[str, Sequence[str]]
) -> None:
    """Choose what the certificate runs on: ragged prompts and a stretch of text, as ids, from the held-out tokens.

    They travel in the bundle, so that anyone can repeat the verification on the same input. `expected` is filled in
    by the verification. `examples` has texts that a person may let the model continue, and messages to send it.
    """
    tokens = open_tokens(held_out)
    random = np.random.default_rng(seed)
    new_tokens = min(recipe.new_tokens, n_positions // 2)
    longest = max(1, min(n_positions - new_tokens, len(tokens) - 1, 128))
    lengths = random.integers(1, longest + 1, recipe.prompts)
    starts = [int(random.integers(0, len(tokens) - length)) for length in lengths]
    golden = {
        **{key: list(texts) for key, texts in examples.items()},
        "new_tokens": new_tokens,
        "prompts": [_ids(tokens[start : start + length]) for start, length in zip(starts, lengths, strict=True)],
        "expected": [],
        "text": _ids(tokens[: recipe.perplexity_tokens]),
        "tolerances": {"max_abs": recipe.max_abs, "perplexity_relative": recipe.perplexity_relative},
        "gates": {f"ort/{precision}": getattr(recipe, f"{precision}_perplexity") for precision in PRECISIONS},
    }
    path.write_text(json.dumps(golden) + "\n", encoding="utf-8")


def _ids(tokens: NDArray[Any]) -> list[int]:
    return [int(token) for token in tokens]
