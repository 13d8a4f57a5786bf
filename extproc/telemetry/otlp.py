"""Spans leave over OTLP/HTTP in JSON, without ever holding up a request.

OpenTelemetry's exporters encode a batch of up to 512 spans in one go, in Python: 40 ms during which the event loop
does not get the interpreter, which is the whole budget of a request (measured: it was behind every fallback at half
load). Here each span is encoded when it ends, and a thread only joins bytes and sends them (docs/decisions/0002).

Specification: OTLP 1.x, "OTLP/HTTP" and "JSON Protobuf Encoding" (ids in hexadecimal, 64-bit integers as strings).
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

import msgspec
import structlog
import urllib3
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.trace import SpanContext
from opentelemetry.util.re import parse_env_headers
from opentelemetry.util.types import AttributeValue
from prometheus_client import Counter
from typing_extensions import override

__all__ = ["OtlpSpanProcessor", "encode_span"]

_KEPT_BYTES = 16 * 1024 * 1024
"""About 8,000 spans. A receiver that is away costs spans, never memory without end."""
_BATCH_SPANS = 512
_SEND_INTERVAL_S = 0.5
_TIMEOUT_S = 5.0
_STOP_LIMIT_S = 2.0

_DROPPED = Counter("ibex_spans_dropped", "Spans that no receiver took")

_log = structlog.get_logger("extproc.telemetry")
_encode = msgspec.json.Encoder().encode


class OtlpSpanProcessor(SpanProcessor):
    """Sends sampled spans to `endpoint`, the receiver's base URL; `/v1/traces` is added here.

    OTEL_EXPORTER_OTLP_HEADERS gives headers, as for any OpenTelemetry exporter.
    """

    def __init__(self, endpoint: str, resource: Resource) -> None:
        self._url = f"{endpoint.rstrip('/')}/v1/traces"
        parts = urllib3.util.parse_url(self._url)
        self._receiver = f"{parts.host}:{parts.port}"
        """For the log: the URL may hold a password."""
        self._headers = {
            **parse_env_headers(os.environ.get("OTEL_EXPORTER_OTLP_HEADERS", ""), liberal=True),
            "content-type": "application/json",
        }
        self._head = (
            b'{"resourceSpans":[{"resource":{"attributes":%b},"scopeSpans":[{"scope":{"name":"extproc"},"spans":['
            % _encode(_attributes(resource.attributes))
        )
        self._spans: deque[bytes] = deque()
        self._kept_bytes = 0
        self._lock = threading.Lock()
        self._pool = urllib3.PoolManager(maxsize=1, retries=False, timeout=_TIMEOUT_S)
        self._is_failing = False
        self._has_spans = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="otlp", daemon=True)
        self._thread.start()

    @override
    def on_end(self, span: ReadableSpan) -> None:
        if span.context is None or not span.context.trace_flags.sampled:
            return
        encoded = encode_span(span)
        with self._lock:
            if self._kept_bytes + len(encoded) > _KEPT_BYTES:
                _DROPPED.inc()
                return
            self._kept_bytes += len(encoded)
            self._spans.append(encoded)
        if not self._has_spans.is_set():
            self._has_spans.set()

    @override
    def shutdown(self) -> None:
        """Send what is left, within two seconds."""
        self._stopping.set()
        self._has_spans.set()
        self._thread.join(_STOP_LIMIT_S)

    @override
    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return not self._spans

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._has_spans.wait()
            self._stopping.wait(_SEND_INTERVAL_S)  # so that spans travel together
            self._has_spans.clear()
            while batch := self._take():
                self._send(batch)

    def _take(self) -> list[bytes]:
        with self._lock:
            batch = [self._spans.popleft() for _ in range(min(_BATCH_SPANS, len(self._spans)))]
            self._kept_bytes -= sum(map(len, batch))
            return batch

    def _send(self, spans: list[bytes]) -> None:
        body = b"%b%b]}]}]}" % (self._head, b",".join(spans))
        try:
            response = self._pool.request("POST", self._url, body=body, headers=self._headers)
            problem = "" if response.status < 300 else f"status {response.status}"
        except Exception as error:  # noqa: BLE001 - whatever it is, this thread must live on
            problem = type(error).__name__
        if problem:
            _DROPPED.inc(len(spans))
        if bool(problem) != self._is_failing:
            self._is_failing = bool(problem)
            if problem:
                _log.warning(
                    "spans are dropped until their receiver takes them again", receiver=self._receiver, problem=problem
                )
            else:
                _log.info("spans are delivered again", receiver=self._receiver)


def encode_span(span: ReadableSpan) -> bytes:
    """One span as OTLP's JSON. It must have a context."""
    context = span.context
    assert context is not None  # noqa: S101 - only a span that never started has none
    encoded: dict[str, Any] = {
        "traceId": f"{context.trace_id:032x}",
        "spanId": f"{context.span_id:016x}",
        "flags": int(context.trace_flags),
        "name": span.name,
        "kind": span.kind.value + 1,  # OTLP counts from 1: 0 is unspecified
        "startTimeUnixNano": str(span.start_time),
        "endTimeUnixNano": str(span.end_time),
        "attributes": _attributes(span.attributes or {}),
        "status": {"code": span.status.status_code.value, "message": span.status.description or ""},
    }
    if span.links:
        encoded["links"] = [_link(link.context) for link in span.links]
    if span.parent is not None:
        encoded["parentSpanId"] = f"{span.parent.span_id:016x}"
    return _encode(encoded)


def _link(context: SpanContext) -> dict[str, Any]:
    return {
        "traceId": f"{context.trace_id:032x}",
        "spanId": f"{context.span_id:016x}",
        "flags": int(context.trace_flags),
    }


def _attributes(attributes: Mapping[str, AttributeValue]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in attributes.items()]


def _value(value: AttributeValue | None) -> dict[str, Any]:
    match value:
        case str():
            return {"stringValue": value}
        case bool():
            return {"boolValue": value}
        case int():
            return {"intValue": str(value)}
        case float():
            return {"doubleValue": value}
        case None:
            return {}
        case _:
            return {"arrayValue": {"values": [_value(item) for item in value]}}
