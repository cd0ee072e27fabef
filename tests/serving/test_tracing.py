"""Each completion is a span: what it was asked for, what it came to, and whose child it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.testclient import TestClient

from serving.errors import InputError
from serving.server import tracing
from serving.server.app import build_app
from serving.server.settings import Settings
from tests.serving.double_engine import DoubleEngine, registry_of

BODY = {"prompt": "A", "temperature": 0, "max_tokens": 4}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def engine() -> Iterator[DoubleEngine]:
    engine = DoubleEngine()
    yield engine
    engine.close()


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """What is exported through a provider that the program set before the server began."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    monkeypatch.setattr(tracing, "_enabled", False)
    tracing.configure({})
    return exporter


@pytest.fixture
def client(engine: DoubleEngine, tmp_path: Path, spans: InMemorySpanExporter) -> Iterator[TestClient]:
    with TestClient(build_app(registry_of(engine, tmp_path / "tiny"), Settings())) as client:
        yield client


def only(spans: Sequence[ReadableSpan]) -> ReadableSpan:
    (span,) = spans
    return span


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_is_a_span(client: TestClient, spans: InMemorySpanExporter, stream: bool) -> None:
    answer = client.post("/v1/completions", json={**BODY, "n": 2, "stream": stream}, headers={"traceparent": PARENT})
    assert answer.status_code == 200
    span = only(spans.get_finished_spans())
    assert (span.name, span.kind) == ("text_completion tiny", SpanKind.SERVER)
    attributes = dict(span.attributes or {})
    assert attributes["gen_ai.request.model"] == "tiny" and attributes["gen_ai.operation.name"] == "text_completion"
    assert (attributes["gen_ai.usage.input_tokens"], attributes["gen_ai.usage.output_tokens"]) == (1, 8)
    assert attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert span.status.status_code != StatusCode.ERROR
    assert [event.name for event in span.events] == ["prompt_read"]
    assert span.parent is not None and span.context is not None
    assert f"{span.context.trace_id:032x}" == f"{span.parent.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{span.parent.span_id:016x}" == PARENT.split("-")[2] and span.parent.is_remote


def test_without_a_parent_it_begins_a_trace(client: TestClient, spans: InMemorySpanExporter) -> None:
    for header in ({}, {"traceparent": "nonsense"}):
        client.post("/v1/completions", json=BODY, headers=header)
    first, second = spans.get_finished_spans()
    assert first.parent is None and second.parent is None
    assert first.context is not None and second.context is not None
    assert first.context.trace_id != second.context.trace_id


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_is_the_spans_status(
    client: TestClient, engine: DoubleEngine, spans: InMemorySpanExporter, stream: bool
) -> None:
    engine.pace = 0.02
    body = {"prompt": [1], "max_tokens": 1000, "ignore_eos": True, "stream": stream}
    client.post("/v1/completions", json=body, headers={"X-Request-Timeout": "0.1"})
    span = only(spans.get_finished_spans())
    assert span.status.status_code == StatusCode.ERROR
    attributes: dict[str, Any] = dict(span.attributes or {})
    assert attributes["error.type"] == "DeadlineExceededError"
    assert attributes["gen_ai.response.finish_reasons"] == ("unfinished",)


def test_what_is_refused_before_a_model_works_is_no_span(client: TestClient, spans: InMemorySpanExporter) -> None:
    assert client.post("/v1/completions", json={**BODY, "max_tokens": 5000}).status_code == 400
    client.get("/v1/models")
    assert not spans.get_finished_spans()


def test_nothing_is_recorded_unless_it_is_asked_for(
    engine: DoubleEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "_enabled", False)
    tracing.configure({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"})
    assert tracing.start_span("text_completion", {}, "tiny") is tracing._NOTHING
    with pytest.raises(InputError, match="OTEL_TRACES_EXPORTER is 'nobody', which is not installed"):
        tracing.configure({"OTEL_TRACES_EXPORTER": "nobody"})
