"""What is counted, and how Prometheus reads it.

Names and meanings are vLLM's after the prefix `gpt2_bundle_`, so that its dashboards and alerts carry over; its
buckets are extended downwards, since a small model answers faster than the smallest of them.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from serving.engine.api import Engine, EngineStats, RequestRecord, StepRecord

PREFIX = "gpt2_bundle_"
WARM_UP = "warm-up"
"""The id of requests that are not counted."""
_DRAFT_SOURCES = ("prompt", "ngram")
_TOTALS = (
    "prompt_tokens", "cached_prompt_tokens", "generated_tokens", "steps", "replayed_tokens",
    *(f"{what}_{source}_tokens" for what in ("drafted", "accepted") for source in _DRAFT_SOURCES),
)  # fmt: skip
_MODEL_LABELS = ("model_name", "version")
FIRST_TOKEN_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0,
)  # fmt: skip
INTER_TOKEN_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
REQUEST_BUCKETS = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0,
)  # fmt: skip
COUNT_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class Histogram:
    """Counts by bucket, written by one thread; a reader may miss the observation under way.

    prometheus_client's own takes a lock and walks its buckets, a microsecond or two for each token of a step.
    """

    def __init__(self, buckets: Sequence[float]) -> None:
        self.buckets = tuple(map(float, buckets))
        self.counts = [0] * (len(buckets) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count `value`; a bucket holds what is at most its bound."""
        self.counts[bisect_left(self.buckets, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        """(bound, values at most that), as the text format wants it."""
        total = 0.0
        lines = []
        for bound, count in zip((*map(str, self.buckets), "+Inf"), list(self.counts), strict=True):
            total += count
            lines.append((bound, total))
        return lines


HISTOGRAMS = {
    "time_to_first_token_seconds": ("From a request's arrival to its first token.", FIRST_TOKEN_BUCKETS),
    "inter_token_latency_seconds": ("From one token of a continuation to its next.", INTER_TOKEN_BUCKETS),
    "e2e_request_latency_seconds": ("From a request's arrival to its last token.", REQUEST_BUCKETS),
    "request_queue_time_seconds": ("From a request's arrival to the first work on it.", REQUEST_BUCKETS),
    "request_prefill_time_seconds": ("From the first work on a request to its first token.", REQUEST_BUCKETS),
    "request_decode_time_seconds": ("From a request's first token to its end.", REQUEST_BUCKETS),
    "request_inference_time_seconds": ("From the first work on a request to its end.", REQUEST_BUCKETS),
    "request_prompt_tokens": ("Prompt tokens of a request.", COUNT_BUCKETS),
    "request_generation_tokens": ("Generated tokens of a request.", COUNT_BUCKETS),
    "step_seconds": ("How long a step of the engine takes.", INTER_TOKEN_BUCKETS),
    "step_batch_size": ("Rows that a step decodes.", COUNT_BUCKETS),
    "iteration_tokens_total": ("Tokens that a step works on, prompt tokens included.", COUNT_BUCKETS),
}
Value = Callable[[EngineStats], float]
GAUGES: dict[str, tuple[str, Value]] = {
    "num_requests_running": ("Slots in use.", lambda stats: stats.active_slots),
    "num_requests_waiting": ("Requests in the queue.", lambda stats: stats.waiting_requests),
    "slots": ("Slots that the engine has.", lambda stats: stats.slots),
    "kv_cache_usage_perc": ("Share of the cache's positions in use, 0 to 1.", lambda stats: _share(stats)),
}
COUNTERS: dict[str, tuple[str, Value]] = {
    "prompt_tokens": ("Prompt tokens taken in.", lambda stats: stats.prompt_tokens),
    "prefix_cache_hits": ("Prompt tokens found in the cache.", lambda stats: stats.cached_prompt_tokens),
    "prefix_cache_queries": ("Prompt tokens that might have been in the cache.", lambda stats: stats.prompt_tokens),
    "generation_tokens": ("Tokens generated.", lambda stats: stats.generated_tokens),
    "steps": ("Steps of the engine.", lambda stats: stats.steps),
    "spec_decode_replayed_tokens": ("Positions decoded again for exact logits.", lambda stats: stats.replayed_tokens),
}
DRAFT_COUNTERS = {
    "spec_decode_num_draft_tokens": ("Tokens drafted for verify steps, by source.", "drafted"),
    "spec_decode_num_accepted_tokens": ("Drafted tokens that were right, by source.", "accepted"),
}


def _share(stats: EngineStats) -> float:
    return stats.cache_tokens / stats.cache_capacity if stats.cache_capacity else 0.0


class EngineMetrics:
    """An `Observer` of one version of a model, its replicas included."""

    def __init__(self) -> None:
        self.histograms = {name: Histogram(buckets) for name, (_, buckets) in HISTOGRAMS.items()}
        self.outcomes: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        """Of all requests together, from arrival to end, by how they ended."""
        self.last_finished = 0.0
        """When a request ended last, in seconds since the epoch; 0 if none has."""
        self.engine: Engine | None = None
        self.last: EngineStats | None = None
        self.warming = False
        """While true, nothing is counted: a warm-up is not a client's request."""
        self._offset = dict.fromkeys(_TOTALS, 0)
        """What engines of this version did before this one, without what its warm-up did."""
        self._lock = threading.Lock()

    def begin(self, engine: Engine) -> None:
        """Count what `engine`, which is warm, does from now on."""
        before, warm = self.last, engine.stats()
        self._offset = {
            name: (0 if before is None else getattr(before, name)) - getattr(warm, name) for name in _TOTALS
        }
        self.engine, self.warming = engine, False

    def on_step(self, record: StepRecord) -> None:
        """Count a step. Replicas share these counts, hence the lock, once a step."""
        if self.warming:
            return
        with self._lock:
            observe = self.histograms["inter_token_latency_seconds"].observe
            for seconds in record.inter_token:
                observe(seconds)
            self.histograms["step_seconds"].observe(record.seconds)
            if record.decoded_rows:
                self.histograms["step_batch_size"].observe(record.decoded_rows)
            self.histograms["iteration_tokens_total"].observe(record.decoded_rows + record.prompt_tokens)

    def on_finish(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        if self.warming or record.request_id == WARM_UP:
            return
        with self._lock:
            self.outcomes[record.reason] = self.outcomes.get(record.reason, 0) + 1
            self.seconds[record.reason] = self.seconds.get(record.reason, 0.0) + record.finished - record.arrived
            self.last_finished = time.time()
            arrived, scheduled, first, finished = record.arrived, record.scheduled, record.first_token, record.finished
            times = {
                "time_to_first_token_seconds": (arrived, first),
                "request_queue_time_seconds": (arrived, scheduled),
                "e2e_request_latency_seconds": (arrived, finished),
                "request_prefill_time_seconds": (scheduled, first),
                "request_decode_time_seconds": (first, finished),
                "request_inference_time_seconds": (scheduled, finished),
            }
            for name, (began, ended) in times.items():
                if began is not None and ended is not None:
                    self.histograms[name].observe(ended - began)
            self.histograms["request_prompt_tokens"].observe(record.prompt_tokens)
            self.histograms["request_generation_tokens"].observe(record.generated_tokens)

    def stats(self) -> EngineStats | None:
        """The engine's own counts and those of the engines before it; the last ones after `release`."""
        if self.engine is None:
            return self.last
        now = self.engine.stats()
        return replace(now, **{name: getattr(now, name) + self._offset[name] for name in _TOTALS})

    def release(self) -> None:
        """Keep the last counts, so that counters stay, and let the engine go."""
        stats = self.stats()
        if self.engine is not None and stats is not None:
            totals = {name: getattr(stats, name) for name in _TOTALS}
            self.last = EngineStats(0, 0, 0, 0, 0, **totals)
            self.engine = None


class Metrics:
    """Everything that one server counts, with a Prometheus registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._models: dict[tuple[str, str], EngineMetrics] = {}
        self._http: dict[tuple[str, str, str], int] = {}
        self._http_seconds: dict[str, Histogram] = {}
        self._grpc: dict[tuple[str, str], int] = {}

    def model(self, name: str, version: int) -> EngineMetrics:
        """The counts of one version, made when first asked for."""
        return self._models.setdefault((name, str(version)), EngineMetrics())

    def on_http(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count an answered request; `path` is the route's, so that its values are few. Called in the event loop."""
        method = method if method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH") else "other"
        key = (method, path, str(status))
        self._http[key] = self._http.get(key, 0) + 1
        self._http_seconds.setdefault(path, Histogram(REQUEST_BUCKETS)).observe(seconds)

    def on_grpc(self, method: str, code: str) -> None:
        """Count an answered gRPC call; a stream is one. Called in the event loop."""
        self._grpc[method, code] = self._grpc.get((method, code), 0) + 1

    def collect(self) -> Iterator[Metric]:
        """Every metric as it is now; called by the registry."""
        models = list(self._models.items())
        for name, (text, _) in HISTOGRAMS.items():
            family = HistogramMetricFamily(PREFIX + name, text, labels=_MODEL_LABELS)
            for labels, counts in models:
                histogram = counts.histograms[name]
                family.add_metric(labels, histogram.cumulative(), histogram.sum)
            yield family
        stats = [(labels, now) for labels, counts in models if (now := counts.stats()) is not None]
        for name, (text, value) in GAUGES.items():
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=_MODEL_LABELS)
            for labels, now in stats:
                gauge.add_metric(labels, value(now))
            yield gauge
        for name, (text, value) in COUNTERS.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=_MODEL_LABELS)
            for labels, now in stats:
                counter.add_metric(labels, value(now))
            yield counter
        for name, (text, what) in DRAFT_COUNTERS.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=(*_MODEL_LABELS, "source"))
            for labels, now in stats:
                for source in _DRAFT_SOURCES:
                    counter.add_metric((*labels, source), getattr(now, f"{what}_{source}_tokens"))
            yield counter
        yield self._outcomes(models)
        yield from self._web()

    def describe(self) -> Iterable[Metric]:
        """Nothing ahead of time: the registry then does not collect when this registers."""
        return []

    def _outcomes(self, models: list[tuple[tuple[str, str], EngineMetrics]]) -> Metric:
        family = CounterMetricFamily(
            PREFIX + "request_success", "Ended requests by how they ended.", labels=(*_MODEL_LABELS, "finished_reason")
        )
        for labels, counts in models:
            for reason, count in list(counts.outcomes.items()):
                family.add_metric((*labels, reason), count)
        return family

    def _web(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            PREFIX + "http_requests", "Answered HTTP requests.", labels=("method", "path", "status")
        )
        for labels, count in list(self._http.items()):
            requests.add_metric(labels, count)
        yield requests
        calls = CounterMetricFamily(PREFIX + "grpc_requests", "Answered gRPC calls.", labels=("method", "code"))
        for pair, count in list(self._grpc.items()):
            calls.add_metric(pair, count)
        yield calls
        seconds = HistogramMetricFamily(
            PREFIX + "http_request_duration_seconds", "From a request's head to its answer's end.", labels=("path",)
        )
        for path, histogram in list(self._http_seconds.items()):
            seconds.add_metric((path,), histogram.cumulative(), histogram.sum)
        yield seconds
