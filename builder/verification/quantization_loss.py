"""The certificate of a variant in fewer bits: how far it lies from Keras in float32, and from itself.

A variant may differ from the reference, up to its gate; it may not differ from itself. What one request is answered
must not depend on the other requests of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builder.training.plan import FEW_TOKENS
from builder.verification.logit_parity import Reference, batches, greedy_tokens
from builder.verification.paired_loss import perplexity_interval
from serving.backends.base import Backend, FloatArray

_PERCENTILES = (50, 90, 99)
# The upper half of a float32's bits: sign, exponent and 7 bits of the fraction, so a bin is at most 1/128 wide.
_HALF = 16


@dataclass
class Distribution:
    """Next-token distributions of a variant and of the reference, and the log-likelihood of the true text."""

    positions: int = 0
    same_choice: int = 0
    divergence: float = 0.0
    loss: float = 0.0
    largest: float = 0.0
    bins: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1 << _HALF, np.int64))
    loss_differences: list[NDArray[np.float64]] = field(default_factory=list)
    """Of each token, in the order of the text, by batches: the variant's loss minus the reference's."""

    def compare(self, reference: FloatArray, ours: FloatArray, targets: NDArray[np.int64]) -> NDArray[np.float64]:
        """Take in one position of some rows: logits [rows, vocab_size] of both, and the tokens that follow, [rows].

        Returns by how much the variant's loss of each is higher, [rows].
        """
        rows = np.arange(len(targets))
        theirs, mine = _log_softmax(reference), _log_softmax(ours)
        self.positions += len(targets)
        self.same_choice += int((reference.argmax(-1) == ours.argmax(-1)).sum())
        self.divergence += float((np.exp(theirs) * (theirs - mine)).sum())
        self.loss -= float(mine[rows, targets].sum())
        difference = np.abs(reference - ours)
        worst = float(difference.max())
        # Not-a-number compares false with everything, so it must be made to count.
        self.largest = max(self.largest, math.inf if math.isnan(worst) else worst)
        self.bins += np.bincount(difference.ravel().view(np.uint32) >> _HALF, minlength=1 << _HALF)
        higher: NDArray[np.float64] = theirs[rows, targets] - mine[rows, targets]
        return higher

    def table(self, reference_perplexity: float) -> dict[str, Any]:
        """The figures as JSON: KL divergence in nats a token, logit differences as percentiles good to one in 128."""
        perplexity = math.exp(self.loss / self.positions)
        differences = {f"p{percent}": self._percentile(percent) for percent in _PERCENTILES}
        return {
            "tokens": self.positions,
            "perplexity": perplexity,
            "perplexity_relative": perplexity / reference_perplexity - 1,
            "perplexity_relative_interval": perplexity_interval(np.concatenate(self.loss_differences)),
            "top1_agreement": self.same_choice / self.positions,
            "kl_divergence": self.divergence / self.positions,
            "logit_difference": differences | {"max": self.largest},
        }

    def _percentile(self, percent: int) -> float:
        index = int(np.searchsorted(np.cumsum(self.bins), self.bins.sum() * percent / 100))
        return float(np.array([index << _HALF], np.uint32).view(np.float32)[0])


def _log_softmax(logits: FloatArray) -> NDArray[np.float64]:
    shifted = (logits - logits.max(-1, keepdims=True)).astype(np.float64)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def distributions(
    backends: Mapping[str, Backend], reference: Reference, windows: NDArray[np.int64]
) -> dict[str, Distribution]:
    """Read `windows` [rows, length] through each backend's cache, token by token, and by one reference pass."""
    return _distributions(backends, reference, windows, 1, 1)


def decoded_distributions(
    backends: Mapping[str, Backend], reference: Reference, windows: NDArray[np.int64], prompt_tokens: int
) -> dict[str, Distribution]:
    """The same for prompts of `prompt_tokens`, 1 to length - 2: only what decode steps predict counts."""
    return _distributions(backends, reference, windows, prompt_tokens, prompt_tokens + 1)


def _distributions(
    backends: Mapping[str, Backend], reference: Reference, windows: NDArray[np.int64], prompt_tokens: int, first: int
) -> dict[str, Distribution]:
    """Prefill `prompt_tokens`, decode the others, and count the predictions of the tokens from number `first` on."""
    result = {name: Distribution() for name in backends}
    for rows in batches(len(windows), 8):
        texts = windows[rows]
        expected = reference(texts)
        for name, backend in backends.items():
            state, logits = backend.prefill(texts[:, :prompt_tokens].tolist(), texts.shape[1])
            higher = []
            for position in range(prompt_tokens, texts.shape[1]):
                if position >= first:
                    higher.append(result[name].compare(expected[:, position - 1], logits, texts[:, position]))
                if position < texts.shape[1] - 1:
                    logits = backend.decode(state, texts[:, position])
            result[name].loss_differences.append(np.stack(higher, axis=1).ravel())
    return result


def greedy_record(
    backend: Backend, prompts: Sequence[Sequence[int]], expected: NDArray[np.int64], batch_size: int
) -> dict[str, Any]:
    """Compare the variant's own greedy text with the reference's, `expected` [prompts, new_tokens], and with itself.

    `first_divergence` is in tokens, the whole length where there is none. `alone` gives each prompt of the first
    batch by itself, and `by_prefill` gives prompt and text at once and takes the last token's choice: both against the
    tokens that the variant gave in company and step by step.
    """
    new_tokens = expected.shape[1]
    ours = np.concatenate(
        [greedy_tokens(backend, prompts[rows], new_tokens) for rows in batches(len(prompts), batch_size)]
    )
    differs = ours != expected
    first = np.where(differs.any(1), differs.argmax(1), new_tokens)
    some = list(prompts[:batch_size])
    alone = np.concatenate([greedy_tokens(backend, [prompt], new_tokens) for prompt in some])
    texts = [[*prompt, *row[:-1].tolist()] for prompt, row in zip(some, ours, strict=False)]
    _, logits = backend.prefill(texts, max(map(len, texts)))
    return {
        "first_divergence": {"min": int(first.min()), "median": float(np.median(first)), "of": new_tokens},
        "prompts_without_divergence": int((~differs.any(1)).sum()),
        "alone": {"equal": int((alone == ours[: len(some)]).sum()), "of": alone.size},
        "by_prefill": {"equal": int((logits.argmax(-1) == ours[: len(some), -1]).sum()), "of": len(some)},
    }


def is_certain(table: Mapping[str, Any], gate: float) -> bool:
    """Whether the figures are of enough tokens to say that the variant keeps its gate, and not by chance."""
    interval = table["perplexity_relative_interval"]
    return table["tokens"] >= FEW_TOKENS and interval is not None and max(map(abs, interval)) <= gate


def problem(table: Mapping[str, Any], gate: float) -> str | None:
    """Why a variant with these figures may not be in a bundle, in words, or None."""
    if not abs(table["perplexity_relative"]) <= gate:
        return f"its perplexity is {table['perplexity_relative']:+.3%} from that of Keras, and its gate is {gate:.3%}"
    alone = table["alone"]
    if alone["equal"] != alone["of"]:
        return f"only {alone['equal']} of {alone['of']} greedy tokens are the same for a prompt alone as in a batch"
    return None
