"""What one trainer has to do, and the data and learning rates that all of them share.

Peers run this file in an environment of their own, so it needs the standard library and numpy only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sizes:
    """A geometry of GPT-2, the sequences of a step and their length in tokens, and the number of steps."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    batch_size: int
    sequence_length: int
    steps: int


@dataclass(frozen=True)
class TrainingJob(Sizes):
    """One training run: GPT-2 of a geometry on a token stream, AdamW, float32, no dropout.

    Matrices of the blocks decay, embeddings, biases and norms do not.

    Attributes:
        tokens: folder with train.bin and validation.bin, flat uint16.
        start: Hugging Face folder of the initial weights; empty starts from random ones.
        validate: whether to measure the validation loss at the end.
        warmup_fraction: share of the steps in which the learning rate rises, before it falls by a cosine.
        final: the rate at the end, as a share of the peak.
    """

    tokens: str = ""
    start: str = ""
    validate: bool = False
    seed: int = 1234
    learning_rate: float = 1e-3
    warmup_fraction: float = 0.05
    final: float = 0.05
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-7
    max_grad_norm: float = 1.0

    @property
    def warmup(self) -> int:
        """Steps in which the learning rate rises."""
        return min(self.steps - 1, round(self.steps * self.warmup_fraction))

    def write(self, path: Path) -> Path:
        """Write the job as JSON and return the path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: Path) -> TrainingJob:
        """The job in a file that `write` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def stream(self, name: str) -> NDArray[np.uint16]:
        """The token ids of "train" or "validation"."""
        return np.fromfile(Path(self.tokens) / f"{name}.bin", "<u2")


def rate(job: TrainingJob, step: int) -> float:
    """The learning rate of update `step`, from 0: linear warm-up from 0, then a cosine (Loshchilov & Hutter 2017)."""
    if step < job.warmup:
        return job.learning_rate * step / job.warmup
    share = min(1.0, (step - job.warmup) / max(1, job.steps - job.warmup))
    return job.learning_rate * (job.final + (1 - job.final) * (1 + math.cos(math.pi * share)) / 2)


def batches(job: TrainingJob) -> Iterator[NDArray[np.int32]]:
    """The batches of all steps, int32 [batch, sequence + 1], in the order that `gpt2-bundle train` takes them.

    Each epoch cuts the stream, taken as a ring, from a random offset into rows, and takes them in a random order.
    """
    tokens = job.stream("train")
    length, within = job.sequence_length, np.arange(job.sequence_length + 1)
    starts: list[int] = []
    epoch = 0
    for _ in range(job.steps):
        while len(starts) < job.batch_size:
            random = np.random.default_rng([job.seed, epoch])
            offset = random.integers(len(tokens))
            starts += (offset + random.permutation(len(tokens) // length) * length).tolist()
            epoch += 1
        taken, starts = np.array(starts[: job.batch_size]), starts[job.batch_size :]
        yield tokens[(taken[:, None] + within) % len(tokens)].astype(np.int32)


def validation_rows(job: TrainingJob) -> Iterator[NDArray[np.int32]]:
    """Rows of at most sequence + 1 tokens that make each validation token but the first a target once."""
    tokens = job.stream("validation").astype(np.int32)
    for start in range(0, len(tokens) - 1, job.sequence_length):
        yield tokens[start : start + job.sequence_length + 1]


def finish(seconds: list[float], validation_loss: float | None, versions: dict[str, str], **more: Any) -> None:
    """Print a peer's result, the last line of its output: seconds of each step, nats a token, versions."""
    print(json.dumps({"seconds": seconds, "validation_loss": validation_loss, "versions": versions, **more}))
