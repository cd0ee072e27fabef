"""Each request that the model works on is a span: what was asked for, what it came to, and whose child it is."""

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

from serving.entrypoints.http_app import build_app
from serving.errors import InputError
from serving.protobuf.open_inference import MESSAGES
from serving.server import tracing
from serving.server.settings import Settings
from serving.server.state import Server
from tests.closed_form import chat_files
from tests.serving.double_engine import DoubleEngine, registry_of
from tests.serving.protocols.open_inference.double_server import all_routes, serving_both

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
    registry, settings = registry_of(engine, tmp_path / "tiny"), Settings()
    with TestClient(build_app(registry, settings, all_routes(registry, settings))) as client:
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


def test_a_chat_is_a_span(engine: DoubleEngine, tmp_path: Path, spans: InMemorySpanExporter) -> None:
    registry = registry_of(engine, tmp_path / "tiny", extra=chat_files("{{ messages[0].content }}"))
    body = {"messages": [{"role": "user", "content": "A"}], "temperature": 0, "max_tokens": 4, "ignore_eos": True}
    with TestClient(build_app(registry, Settings())) as client:
        assert client.post("/v1/chat/completions", json=body).status_code == 200
    span = only(spans.get_finished_spans())
    attributes = dict(span.attributes or {})
    assert span.name == "chat tiny" and attributes["gen_ai.operation.name"] == "chat"
    assert (attributes["gen_ai.usage.input_tokens"], attributes["gen_ai.usage.output_tokens"]) == (1, 4)
    registry.get("tiny").close()


GENERATE = {"text_input": "A", "temperature": 0, "max_tokens": 4, "ignore_eos": True}
TENSORS = [{"name": "text", "datatype": "BYTES", "shape": [2], "data": ["A", "B"]}] + [
    {"name": name, "datatype": datatype, "shape": [2], "data": [value] * 2}
    for name, datatype, value in (("max_new_tokens", "INT32", 4), ("temperature", "FP32", 0), ("top_k", "INT32", 0),
                                  ("top_p", "FP32", 1), ("seed", "INT64", 0))
]  # fmt: skip
PREDICT = {tensor["name"]: tensor["data"] for tensor in TENSORS}


@pytest.mark.parametrize(
    ("path", "body", "prompt_tokens", "events"),
    [
        ("/v2/models/tiny/generate", GENERATE, 1, []),
        ("/v2/models/tiny/generate", {**GENERATE, "text_input": ["A", "BC"]}, 3, []),
        ("/v2/models/tiny/generate_stream", GENERATE, 1, ["prompt_read"]),
        ("/v2/models/tiny/infer", {"inputs": TENSORS, "parameters": {"signature_name": "generate_text"}}, 2, []),
        ("/v1/models/tiny:predict", {"inputs": PREDICT, "signature_name": "generate_text"}, 2, []),
    ],
)
def test_other_protocols_requests_are_spans_too(
    client: TestClient, spans: InMemorySpanExporter, path: str, body: Any, prompt_tokens: int, events: list[str]
) -> None:
    assert client.post(path, json=body, headers={"traceparent": PARENT}).status_code == 200
    span = only(spans.get_finished_spans())
    attributes = dict(span.attributes or {})
    rows = len(body["text_input"]) if "text_input" in body else 2
    assert (span.name, span.kind) == ("text_completion tiny", SpanKind.SERVER)
    assert attributes["gen_ai.usage.input_tokens"] == prompt_tokens
    assert attributes["gen_ai.usage.output_tokens"] == 4 * rows
    assert attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert [event.name for event in span.events] == events
    assert span.parent is not None and f"{span.parent.span_id:016x}" == PARENT.split("-")[2]


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_by_another_protocol(
    client: TestClient, engine: DoubleEngine, spans: InMemorySpanExporter, stream: bool
) -> None:
    engine.pace = 0.02
    path, body = "/v2/models/tiny/generate" + "_stream" * stream, {**GENERATE, "max_tokens": 1000}
    client.post(path, json=body, headers={"X-Request-Timeout": "0.1"})
    span = only(spans.get_finished_spans())
    attributes: dict[str, Any] = dict(span.attributes or {})
    assert span.status.status_code == StatusCode.ERROR and attributes["error.type"] == "DeadlineExceededError"
    assert attributes["gen_ai.usage.output_tokens"] > 0


def test_by_grpc_the_parent_is_in_the_metadata(
    engine: DoubleEngine, tmp_path: Path, spans: InMemorySpanExporter
) -> None:
    grpc = pytest.importorskip("grpc")
    message = MESSAGES["ModelInferRequest"](model_name="tiny")
    text = message.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    text.contents.bytes_contents.append(b"A")
    message.parameters["max_tokens"].int64_param = 4
    registry = registry_of(engine, tmp_path / "tiny")
    with serving_both(Server(registry, Settings())) as (_, address), grpc.insecure_channel(address) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        infer(message.SerializeToString(), metadata=[("traceparent", PARENT)], timeout=20)
    span = only(spans.get_finished_spans())
    assert span.parent is not None and f"{span.parent.span_id:016x}" == PARENT.split("-")[2]


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


def test_what_no_model_works_on_is_no_span(client: TestClient, spans: InMemorySpanExporter) -> None:
    assert client.post("/v1/completions", json={**BODY, "max_tokens": 5000}).status_code == 400
    assert client.post("/v2/models/tiny/generate", json={**GENERATE, "max_tokens": 5000}).status_code == 400
    tokenize = {"inputs": TENSORS[:1], "parameters": {"signature_name": "tokenize"}}
    assert client.post("/v2/models/tiny/infer", json=tokenize).status_code == 200
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
