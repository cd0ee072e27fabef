"""The bundle's own held-out text, and prompts that are cut from it."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from serving.bundle import Bundle
from serving.errors import BundleError


def read_text(bundle: Bundle) -> list[int]:
    """Return the held-out text of golden.json as token ids. Raises BundleError if the file has none."""
    path = bundle.path("golden.json")
    try:
        text = [int(token) for token in json.loads(path.read_text(encoding="utf-8"))["text"]]
        if not text:
            raise ValueError("its text is empty")
    except (ValueError, TypeError, KeyError) as error:
        raise BundleError(f"{path}: not a golden record ({type(error).__name__}: {error}); build it again") from None
    return text


def cut_prompts(text: Sequence[int], batch_size: int, prompt_tokens: int) -> list[list[int]]:
    """Cut `batch_size` consecutive prompts from a text that is taken as a ring."""
    ring = np.asarray(text)
    starts = np.arange(batch_size)[:, None] * prompt_tokens
    prompts: list[list[int]] = ring[(starts + np.arange(prompt_tokens)) % len(ring)].tolist()
    return prompts
