"""Ports, probes and metrics of `gpt2-bundle serve`: one table for every deployment and for the guide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Port:
    """A port that the server listens on."""

    name: str
    number: int
    meaning: str


@dataclass(frozen=True)
class Probe:
    """A question that a supervisor asks by HTTP; `period` and `timeout` are in seconds."""

    kind: Literal["startup", "readiness", "liveness"]
    path: str
    period: int
    timeout: int
    failures: int
    meaning: str


@dataclass(frozen=True)
class Metric:
    """A series of /metrics that a deployment depends on."""

    name: str
    meaning: str


HTTP = Port("http", 8000, "OpenAI, TensorFlow Serving REST, Open Inference Protocol, health, metrics")
GRPC = Port("grpc", 8001, "TensorFlow Serving and Open Inference Protocol over gRPC, `grpc.health.v1.Health`")
PORTS = (HTTP, GRPC)

# A startup probe of this many failures is lengthened by the time that the bundle takes to be read.
PROBES = (
    Probe("startup", "/health/ready", 5, 3, 24, "The model is loaded and has generated tokens."),
    Probe("readiness", "/health/ready", 5, 3, 2, "The server takes requests. It fails while the server drains."),
    Probe("liveness", "/health/live", 10, 5, 6, "The process answers."),
)
METRICS_PATH = "/metrics"
QUEUE = Metric("gpt2_bundle_num_requests_waiting", "Requests in the queue. The autoscalers keep its average per pod.")
METRICS = (
    QUEUE,
    Metric("gpt2_bundle_num_requests_running", "Sequences that are decoded."),
    Metric("gpt2_bundle_kv_cache_usage_perc", "Share of the KV cache in use."),
)

# Load balancers need a moment to forget a pod before its server refuses new requests.
PRE_STOP_SECONDS = 5
# For complete answers to reach their clients after the drain; `serving/entrypoints/runner.py` has the same figure.
FLUSH_SECONDS = 5
KEYS_VARIABLE = "GPT2_BUNDLE_API_KEYS"
# Memory of request bodies in flight; `serving/server/settings.py` has the same figure.
BODY_BYTES = 256 << 20
# The process without a model: 115 MiB measured with gRPC (Python 3.11, ONNX Runtime 1.31, CPU), two chat workers of
# 22 MiB each, and room for libraries of other versions.
PROCESS_BYTES = 192 << 20
# Host memory of a CUDA context and its libraries. An assumption: no GPU was measured.
CUDA_BYTES = 2 << 30


def markdown_table() -> str:
    """The table of ports, probes and metrics in Markdown."""
    rows = [("port", f"`{port.name}` {port.number}", port.meaning) for port in PORTS]
    rows += [
        (f"{probe.kind} probe", f"`GET {probe.path}` every {probe.period} s, {probe.failures} failures", probe.meaning)
        for probe in PROBES
    ]
    rows += [("metric", f"`{metric.name}` at `{METRICS_PATH}`", metric.meaning) for metric in METRICS]
    return "\n".join(["| kind | where | meaning |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])
