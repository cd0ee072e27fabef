"""Metrics from what clients saw. Pure functions; every time is in seconds.

Definitions are those of docs/bench-format.md. Latencies begin at the scheduled time, not at the sending, so that a
client or a target that falls behind cannot hide it (coordinated omission; G. Tene, "How NOT to Measure Latency").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.suite.load.events import Response

QUANTILES = (0.5, 0.9, 0.99)
KINDS = ("mean", "p50", "p90", "p99")
LATENCIES = ("ttft", "inter_token", "tpot", "e2e", "queue")


@dataclass(frozen=True)
class Objectives:
    """A request is good if each of these that is set holds for it; seconds."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None


def ttft(response: Response) -> float | None:
    """Scheduled time to first token; None for a failed or empty response."""
    return response.token_times[0] - response.scheduled if _answered(response) else None


def inter_token(response: Response) -> list[float]:
    """From each token to the next; the wait for the first is not among them.

    Empty for a failed response and for one that came whole, where no token was seen to come.
    """
    gaps: list[float] = np.diff(response.token_times if _answered(response) and response.streamed else ()).tolist()
    return gaps


def tpot(response: Response) -> float | None:
    """Time per output token after the first: (last token - first token) / (tokens - 1); None below two tokens."""
    times = response.token_times
    if not _answered(response) or not response.streamed or len(times) < 2:
        return None
    return (times[-1] - times[0]) / (len(times) - 1)


def e2e(response: Response) -> float | None:
    """Scheduled time to the end of the answer; None for a failed response."""
    return response.finished - response.scheduled if response.error is None else None


def queue(response: Response) -> float | None:
    """Scheduled time to the start of work; None where the client cannot see that."""
    return None if response.error is not None or response.started is None else response.started - response.scheduled


_SINGLE: dict[str, Callable[[Response], float | None]] = {"ttft": ttft, "tpot": tpot, "e2e": e2e, "queue": queue}


def is_good(response: Response, objectives: Objectives) -> bool:
    """Whether a response meets every objective that is set; one without a figure does not."""
    for name, limit in vars(objectives).items():
        # A single token has no time after the first, and so cannot be late.
        if limit is None or (name == "tpot" and response.streamed and len(response.token_times) == 1):
            continue
        value = _SINGLE[name](response)
        if value is None or value > limit:
            return False
    return response.error is None


def samples(responses: Sequence[Response], name: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Every value of the latency `name` and the place of its response in `responses`, which is its cluster."""
    found: list[list[float]]
    if name == "inter_token":
        found = [inter_token(response) for response in responses]
    else:
        found = [[] if (value := _SINGLE[name](response)) is None else [value] for response in responses]
    owners = np.repeat(np.arange(len(found)), [len(values) for values in found])
    return np.array([value for values in found for value in values], np.float64), owners


def summarise_latency(
    values: NDArray[np.float64], owners: NDArray[np.int64], resamples: int = 300, seed: int = 0
) -> dict[str, Any] | None:
    """Mean and quantiles as `value`, `low` and `high`, and the number of samples; None if there are none.

    Intervals are of 95 %, percentile bootstrap ones (Efron 1979) that draw whole responses, since the tokens of one
    response are not independent of each other.
    """
    if len(values) == 0:
        return None
    order = np.argsort(values, kind="stable")
    values, owners = values[order], owners[order]
    clusters, places = np.unique(owners, return_inverse=True)
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples if len(clusters) > 1 else 0):
        times = np.bincount(random.integers(0, len(clusters), len(clusters)), minlength=len(clusters))
        drawn.append(mean_and_quantiles(np.repeat(values, times[places])))
    points = mean_and_quantiles(values)
    bounds = np.percentile(np.array(drawn or [points]), [2.5, 97.5], axis=0).tolist()
    columns = zip(KINDS, points, *bounds, strict=True)
    estimates = {kind: {"value": value, "low": low, "high": high} for kind, value, low, high in columns}
    return {"samples": len(values), **estimates}


def mean_and_quantiles(values: NDArray[np.float64]) -> list[float]:
    """Mean and `QUANTILES` of sorted values, interpolated linearly (type 7 of Hyndman and Fan 1996)."""
    places = np.array(QUANTILES) * (len(values) - 1)
    low = places.astype(np.int64)
    high = np.minimum(low + 1, len(values) - 1)
    return [float(values.mean()), *(values[low] + (values[high] - values[low]) * (places - low)).tolist()]


def throughput(responses: Sequence[Response], objectives: Objectives) -> dict[str, float | None]:
    """Tokens and requests a second of what was answered, from the first scheduled time to the last end, if that lasts.

    `goodput` is the requests a second that meet the objectives, None if none is set.
    """
    ends, starts = [each.finished for each in responses], [each.scheduled for each in responses]
    seconds = max(ends) - min(starts) if responses else 0.0
    answered = [each for each in responses if each.error is None]
    counts: dict[str, int | None] = {
        "output_tokens_per_second": sum(len(each.token_times) for each in answered),
        "input_tokens_per_second": sum(each.prompt_tokens for each in answered),
        "requests_per_second": len(answered),
        "goodput": None,
    }
    if objectives != Objectives():
        counts["goodput"] = sum(is_good(each, objectives) for each in responses)
    return {name: count / seconds if seconds and count is not None else None for name, count in counts.items()}


def summarise(repeats: Sequence[Sequence[Response]], objectives: Objectives, resamples: int = 300) -> dict[str, Any]:
    """One target in one scenario: latencies over the responses of all repeats, throughputs as medians over repeats.

    `repeats` inside `throughput` holds each repeat's own figure, in order.
    """
    every = [response for responses in repeats for response in responses]
    per_repeat = [throughput(responses, objectives) for responses in repeats]
    rates: dict[str, Any] = {}
    for name in per_repeat[0] if per_repeat else ():
        found = [value for values in per_repeat if (value := values[name]) is not None]
        rates[name] = {"value": float(np.median(found)), "repeats": found} if found else None
    late = np.array([each.sent - each.scheduled for each in every])
    return {
        "requests": len(every),
        "failed": sum(response.error is not None for response in every),
        "output_tokens": sum(len(response.token_times) for response in every if response.error is None),
        "latency": {name: summarise_latency(*samples(every, name), resamples=resamples) for name in LATENCIES},
        "throughput": rates,
        "sent_late": summarise_latency(late, np.arange(len(every)), resamples),
    }


def _answered(response: Response) -> bool:
    return response.error is None and len(response.token_times) > 0
