"""Metrics from what clients saw. Pure functions; every time is in seconds.

Definitions are those of docs/bench-format.md. Latencies begin at the scheduled time, not at the sending, so that a
client or a target that falls behind cannot hide it (coordinated omission; G. Tene, "How NOT to Measure Latency").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.suite.load.events import Response

QUANTILES = (0.5, 0.9, 0.99)
LATENCIES = ("ttft", "inter_token", "tpot", "e2e", "queue")


@dataclass(frozen=True)
class Objectives:
    """A request is good if each of these that is set holds for it; seconds."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def ttft(response: Response) -> float | None:
    """Scheduled time to first token; None for a failed or empty response."""
    return response.token_times[0] - response.scheduled if _answered(response) else None


def inter_token(response: Response) -> list[float]:
    """From each token to the next; the wait for the first is not among them.

    Empty for a failed response and for one that came whole, where no token was seen to come.
    """
    if not _answered(response) or not response.streamed:
        return []
    gaps: list[float] = np.diff(response.token_times).tolist()
    return gaps


def tpot(response: Response) -> float | None:
    """Time per output token after the first: (last token - first token) / (tokens - 1); None below two tokens."""
    if not _answered(response) or not response.streamed or len(response.token_times) < 2:
        return None
    return (response.token_times[-1] - response.token_times[0]) / (len(response.token_times) - 1)


def e2e(response: Response) -> float | None:
    """Scheduled time to the end of the answer; None for a failed response."""
    return response.finished - response.scheduled if response.error is None else None


def queue(response: Response) -> float | None:
    """Scheduled time to the start of work; None where the client cannot see that."""
    known = response.error is None and response.started is not None
    return response.started - response.scheduled if known and response.started is not None else None


def is_good(response: Response, objectives: Objectives) -> bool:
    """Whether a response meets every objective that is set; one without a figure does not."""
    pairs = ((ttft, objectives.ttft), (tpot, objectives.tpot), (e2e, objectives.e2e))
    for measure, limit in pairs:
        if limit is None:
            continue
        value = measure(response)
        # A single token has no time after the first, and so cannot be late.
        single = measure is tpot and response.streamed and len(response.token_times) == 1
        if response.error is not None or not (single or (value is not None and value <= limit)):
            return False
    return response.error is None


def samples(responses: Sequence[Response], name: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Every value of the latency `name` and the place of its response in `responses`, which is its cluster."""
    values: list[float] = []
    owners: list[int] = []
    single = {"ttft": ttft, "tpot": tpot, "e2e": e2e, "queue": queue}
    for place, response in enumerate(responses):
        if name == "inter_token":
            found = inter_token(response)
        else:
            value = single[name](response)
            found = [] if value is None else [value]
        values += found
        owners += [place] * len(found)
    return np.array(values, np.float64), np.array(owners, np.int64)


def summarise_latency(
    values: NDArray[np.float64], owners: NDArray[np.int64], resamples: int = 300, seed: int = 0
) -> dict[str, Any] | None:
    """Mean and quantiles with intervals, and the number of samples; None if there are none.

    Quantiles interpolate linearly between order statistics. Intervals are percentile bootstrap ones (Efron 1979) that
    draw whole responses, since the tokens of one response are not independent of each other.
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
        again = np.repeat(values, times[places])
        drawn.append([again.mean(), *sorted_quantiles(again)])
    points = [float(values.mean()), *sorted_quantiles(values)]
    bounds = np.percentile(np.array(drawn), [2.5, 97.5], axis=0) if drawn else np.array([points, points])
    names = ("mean", *(f"p{quantile * 100:g}" for quantile in QUANTILES))
    summary: dict[str, Any] = {"samples": len(values)}
    for column, name in enumerate(names):
        summary[name] = asdict(Estimate(points[column], float(bounds[0][column]), float(bounds[1][column])))
    return summary


def sorted_quantiles(values: NDArray[np.float64]) -> list[float]:
    """`QUANTILES` of values that are sorted, interpolated linearly (type 7 of Hyndman and Fan 1996)."""
    found = []
    for quantile in QUANTILES:
        position = quantile * (len(values) - 1)
        low = int(position)
        high = min(low + 1, len(values) - 1)
        found.append(float(values[low] + (values[high] - values[low]) * (position - low)))
    return found


def span(responses: Sequence[Response]) -> float | None:
    """From the first scheduled time to the last end; None for no responses."""
    if not responses:
        return None
    return max(each.finished for each in responses) - min(each.scheduled for each in responses)


def throughput(responses: Sequence[Response], objectives: Objectives) -> dict[str, float | None]:
    """Tokens and requests a second over the span, of what was answered; None where there is no span.

    `goodput` is the requests a second that meet the objectives, None if none is set.
    """
    seconds = span(responses)
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
    latencies = {name: summarise_latency(*samples(every, name), resamples=resamples) for name in LATENCIES}
    per_repeat = [throughput(responses, objectives) for responses in repeats]
    rates: dict[str, Any] = {}
    for name in per_repeat[0] if per_repeat else ():
        found = [values[name] for values in per_repeat if values[name] is not None]
        rates[name] = {"value": float(np.median(np.array(found))), "repeats": found} if found else None
    return {
        "requests": len(every),
        "failed": sum(response.error is not None for response in every),
        "output_tokens": sum(len(response.token_times) for response in every if response.error is None),
        "latency": latencies,
        "throughput": rates,
        "sent_late": summarise_latency(
            np.array([each.sent - each.scheduled for each in every]), np.arange(len(every)), resamples
        ),
    }


def _answered(response: Response) -> bool:
    return response.error is None and len(response.token_times) > 0
