"""OpenTelemetry spans: taken over from Envoy's trace, exported off the request path.

Code that makes spans uses the OpenTelemetry API alone; this module gives it something to export to. Without an
endpoint the API's own no-op stays in place, and a span costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.trace import SpanContext
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from extproc.telemetry.otlp import OtlpSpanProcessor

__all__ = ["linked_spans", "parent_of", "start_spans", "traceparent_of"]

_MOST_CHARACTERS = 256
"""Of one attribute: ids and names are shorter, and nothing else belongs into a span."""

_MOST_LINKS = 16
"""Of one span: a request has fewer memories than that, most often."""

_propagator = TraceContextTextMapPropagator()


def start_spans(process: str, endpoint: str) -> TracerProvider | None:
    """Send this process's spans to an OTLP/HTTP receiver, by its base URL; None when there is no endpoint.

    The parent's sampling decision holds.
    """
    if not endpoint:
        return None
    resource = Resource.create({"service.name": f"ibex-{process}"})
    provider = TracerProvider(resource=resource, span_limits=SpanLimits(max_span_attribute_length=_MOST_CHARACTERS))
    provider.add_span_processor(OtlpSpanProcessor(endpoint, resource))
    trace.set_tracer_provider(provider)
    return provider


def parent_of(carriers: Iterable[str | None]) -> Context | None:
    """The context of the first `traceparent` that is there; None without one."""
    for traceparent in carriers:
        if traceparent:
            return _propagator.extract({"traceparent": traceparent})
    return None


def linked_spans(traceparents: Iterable[object]) -> list[SpanContext]:
    """Each span once, the first few, of what may hold anything: what is no W3C `traceparent` is passed over."""
    found: dict[tuple[int, int], SpanContext] = {}
    for traceparent in traceparents:
        if len(found) == _MOST_LINKS:
            break
        if isinstance(traceparent, str):
            context = trace.get_current_span(_propagator.extract({"traceparent": traceparent}, Context()))
            span = context.get_span_context()
            if span.is_valid:
                found.setdefault((span.trace_id, span.span_id), span)
    return list(found.values())


def traceparent_of(context: SpanContext) -> str | None:
    """W3C `traceparent` for a call that this span makes; None when there is no trace."""
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
