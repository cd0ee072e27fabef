"""OpenTelemetry spans where its packages are installed and the environment asks for them; nothing otherwise.

The names are those of OpenTelemetry's semantic conventions for generative AI. A provider that a program (or
`opentelemetry-instrument`) has set is used as it is; without one, OTEL_TRACES_EXPORTER (such as "otlp" or "console")
or OTEL_EXPORTER_OTLP_ENDPOINT makes `configure` set one from the exporters that are installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

from serving import __version__
from serving.errors import InputError, RuntimeMissingError

_SCOPE = "gpt2_bundle"
COMPLETION = "text_completion"
"""The operation of every request that the model works on."""


class Span:
    """One request's span; this one records nothing."""

    def event(self, name: str) -> None:
        """Something happened now."""

    def end(
        self, prompt_tokens: int, generated_tokens: int, reasons: Sequence[str], error: BaseException | None = None
    ) -> None:
        """The request is over; `error` is what ended it, if it is not a result."""


class _RealSpan(Span):
    def __init__(self, span: Any) -> None:
        self._span = span

    def event(self, name: str) -> None:
        self._span.add_event(name)

    def end(
        self, prompt_tokens: int, generated_tokens: int, reasons: Sequence[str], error: BaseException | None = None
    ) -> None:
        if error is not None:
            from opentelemetry.trace import StatusCode

            self._span.set_attribute("error.type", type(error).__name__)
            self._span.set_status(StatusCode.ERROR)
        self._span.set_attribute("gen_ai.usage.input_tokens", prompt_tokens)
        self._span.set_attribute("gen_ai.usage.output_tokens", generated_tokens)
        self._span.set_attribute("gen_ai.response.finish_reasons", list(reasons))
        self._span.end()


OpenSpan = Callable[[], Span]
"""Begins the span of one request, once the model has taken it."""
_NOTHING = Span()
_enabled = False


def configure(environment: Mapping[str, str] = os.environ) -> None:
    """Begin to trace if `environment` asks for it.

    Raises RuntimeMissingError if the packages are missing, and InputError for an exporter that is not installed.
    """
    global _enabled
    wanted = environment.get("OTEL_TRACES_EXPORTER", "otlp" if environment.get("OTEL_EXPORTER_OTLP_ENDPOINT") else "")
    try:
        from opentelemetry import trace
    except ModuleNotFoundError:
        if wanted in ("", "none"):
            return
        raise RuntimeMissingError("tracing needs OpenTelemetry; run: pip install 'gpt2-bundle[trace]'") from None
    _enabled = wanted not in ("", "none")
    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        _enabled = True  # Whoever set a provider wants spans.
        return
    if not _enabled:
        return
    try:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError:
        raise RuntimeMissingError("tracing needs OpenTelemetry's SDK; run: pip install 'gpt2-bundle[trace]'") from None
    found = list(metadata.entry_points(group="opentelemetry_traces_exporter", name=wanted))
    if not found:
        raise InputError(
            f"OTEL_TRACES_EXPORTER is {wanted!r}, which is not installed; install opentelemetry-exporter-{wanted}, "
            "or set OTEL_TRACES_EXPORTER=none"
        )
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(found[0].load()()))
    trace.set_tracer_provider(provider)


def start_span(operation: str, headers: Mapping[str, str], model: str) -> Span:
    """A span for one request, child of the one that `headers` name (W3C traceparent), if spans are recorded."""
    if not _enabled:
        return _NOTHING
    from opentelemetry import propagate, trace

    tracer = trace.get_tracer(_SCOPE, __version__)
    span = tracer.start_span(
        f"{operation} {model}",
        context=propagate.extract(headers),
        kind=trace.SpanKind.SERVER,
        attributes={"gen_ai.operation.name": operation, "gen_ai.system": _SCOPE, "gen_ai.request.model": model},
    )
    return _RealSpan(span)
