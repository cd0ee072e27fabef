"""What a generation costs at worst: seconds against the REST timeout, bytes against a GPU's memory."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from builder.tf_export.lint_config import batching_files, read_text
from builder.tf_export.lint_graph import Finding
from serving.bundle import Geometry
from serving.deploy.tf_serving_config import BATCH_SIZES

_PARAMETERS = {"token_ids", "lengths", "max_new_tokens", "temperature", "top_k", "top_p", "seed"}
_STEPS = 16
_FLOAT = 4


def check_time(ms_per_token: float, context: int, timeout: float) -> Finding:
    """The longest generation, `context` tokens in one row, compared with the REST timeout of the server in seconds.

    An error where one token alone takes longer, so that no request can be answered; a warning where the longest does,
    since callers may ask for fewer tokens, or stream, and the timeout is a flag of the server.
    """
    seconds = ms_per_token * context / 1000
    if ms_per_token > 1000 * timeout:
        text = f"one token takes {ms_per_token / 1000:.1f} s, over the REST timeout of {timeout:g} s"
        return Finding("error", "timeout", "serving_default", f"{text}, so that no request is answered")
    text = f"{context} tokens at {ms_per_token:.3g} ms take {seconds:.1f} s"
    if seconds <= timeout:
        return Finding("note", "timeout", "serving_default", f"{text}, within the REST timeout of {timeout:g} s")
    most = int(timeout * 1000 / ms_per_token)
    flag = f"--rest_api_timeout_in_ms={int(seconds * 1500)}"
    text += f", over the REST timeout of {timeout:g} s; set {flag}, ask for at most {most} tokens, or stream by slots"
    return Finding("warning", "timeout", "serving_default", text)


def measure(version: Path) -> float | None:
    """Milliseconds a token of one row here: the median of three runs of 17 tokens, less one of 1 token.

    None where `serving_default` is not this project's, or where the model ends its text at once.
    """
    from builder.tf_export.session_servable import SessionServable

    servable = SessionServable(version)
    if "serving_default" not in servable.signatures:
        return None
    if set(servable.signatures["serving_default"].inputs) != _PARAMETERS:
        return None

    def run(tokens: int, seed: int) -> tuple[float, int]:
        began = time.perf_counter()
        outputs = servable.run(
            "serving_default",
            token_ids=np.zeros([1, 1], np.int32),
            lengths=np.ones(1, np.int32),
            max_new_tokens=np.array([tokens], np.int32),
            temperature=np.ones(1, np.float32),
            top_k=np.zeros(1, np.int32),
            top_p=np.ones(1, np.float32),
            seed=np.array([seed], np.int64),
        )
        return 1000 * (time.perf_counter() - began), int(outputs["lengths"][0])

    run(1 + _STEPS, 0)
    samples = []
    for seed in range(3):
        whole, made = run(1 + _STEPS, seed)
        first, _ = run(1, seed)
        if made > 1:
            samples.append(max(0.0, whole - first) / (made - 1))
    return float(np.median(samples)) if samples else None


def stored_bytes(version: Path) -> int:
    """Bytes of the weights: the variables, and the graph with its constants."""
    return sum(path.stat().st_size for path in [version / "saved_model.pb", *(version / "variables").glob("*")])


def largest_batch(version: Path) -> int:
    """The largest batch that the server will run: of the batching parameters next to the SavedModel in a
    bundle (`deploy/tf_serving`) or a deployment (`config`), or else of those that this project writes.
    """
    for path in batching_files(version):
        text = read_text(path)
        sizes = re.findall(r"^\s*allowed_batch_sizes\s*:\s*(\d{1,9})", text, re.MULTILINE)
        sizes = sizes or re.findall(r"^\s*max_batch_size\s*\{\s*value\s*:\s*(\d{1,9})", text, re.MULTILINE)
        if sizes:
            return max(int(size) for size in sizes)
    return BATCH_SIZES[-1]


def memory(version: Path, geometry: Geometry | None, rows: int) -> dict[str, int]:
    """Estimated bytes on a device at batches of `rows` and the full context, by purpose.

    The cache counts twice, since it is copied when it grows. Activations are the larger of a prefill's (one block's
    attention scores before and after the softmax, the MLP's hidden rows before and after GELU) and of `score`'s
    logits with their logarithms. Without a geometry only the weights are known.
    """
    parts = {"weights": stored_bytes(version)}
    if geometry is None:
        return parts
    width = geometry.n_positions
    parts["cache"] = 2 * 2 * geometry.n_layer * rows * width * geometry.n_embd * _FLOAT
    block = rows * width * (geometry.n_head * width + geometry.n_inner) * _FLOAT
    parts["activations"] = 2 * max(block, rows * width * geometry.vocab_size * _FLOAT)
    return parts


def check_memory(parts: dict[str, int], rows: int, budget: int | None) -> Iterator[Finding]:
    """The estimate, as an error if it passes `budget` bytes."""
    total = sum(parts.values())
    each = ", ".join(f"{name} {gib(size)}" for name, size in parts.items())
    text = f"about {gib(total)} at batch {rows} and full context ({each})"
    if "cache" not in parts:
        text = f"weights of {gib(total)}; cache and activations unknown, since this is not a bundle's model"
    if budget is not None and total > budget:
        advice = "serve a smaller batch or context, or a larger GPU"
        yield Finding("error", "memory", "model", f"{text}, over the budget of {gib(budget)}; {advice}")
    else:
        yield Finding("note", "memory", "model", text)


def gib(size: float) -> str:
    """Bytes as GiB, or MiB where it is little: the unit in which GPUs are sold."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"


def parse_size(text: str) -> int:
    """Bytes of "16GiB", "80GB" or "512MiB". Raises ValueError for anything else."""
    units: dict[str, Any] = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6}
    number, unit = text[:-3].strip(), text[-3:].lower()
    if unit not in units:
        number, unit = text[:-2].strip(), text[-2:].lower()
    size = float(number) * units[unit] if unit in units else -1.0
    if not 0 < size < 2**60:
        raise ValueError(text)
    return int(size)
