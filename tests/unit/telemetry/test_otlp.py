from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, StatusCode, TraceFlags, set_span_in_context
from typing_extensions import override

from extproc.telemetry.otlp import OtlpSpanProcessor

PARENT = SpanContext(0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331, is_remote=True, trace_flags=TraceFlags(1))


class Receiver:
    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.status = 200

    def spans(self) -> list[dict[str, Any]]:
        return [
            span
            for request in self.requests
            for resource in request["resourceSpans"]
            for scope in resource["scopeSpans"]
            for span in scope["spans"]
        ]


@pytest.fixture
def receiver() -> Iterator[tuple[Receiver, str]]:
    kept = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            kept.paths.append(self.path)
            kept.requests.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(kept.status)
            self.send_header("content-length", "0")
            self.end_headers()

        @override
        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield kept, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join(5)


def provider(url: str) -> TracerProvider:
    resource = Resource({"service.name": "ibex-test", "n": 1})
    made = TracerProvider(resource=resource, shutdown_on_exit=False)
    made.add_span_processor(OtlpSpanProcessor(url, resource))
    return made


def test_a_span_arrives_as_otlp_says(receiver: tuple[Receiver, str]) -> None:
    kept, url = receiver
    traces = provider(url)
    parent = set_span_in_context(NonRecordingSpan(PARENT))
    span = traces.get_tracer("t").start_span("context.assemble", parent, SpanKind.CLIENT, start_time=5)
    span.set_attributes({"s": 'a"b', "i": 2**53 + 1, "f": 0.5, "b": True, "l": ["x", "y"], "e": []})
    span.set_status(StatusCode.ERROR, "timeout")
    span.end(end_time=7)
    traces.shutdown()
    assert kept.paths == ["/v1/traces"]
    [resource] = kept.requests[0]["resourceSpans"]
    assert {"key": "service.name", "value": {"stringValue": "ibex-test"}} in resource["resource"]["attributes"]
    [sent] = kept.spans()
    assert (sent["traceId"], sent["parentSpanId"]) == (f"{PARENT.trace_id:032x}", f"{PARENT.span_id:016x}")
    assert len(sent["spanId"]) == 16
    assert (sent["name"], sent["kind"]) == ("context.assemble", 3)
    assert (sent["startTimeUnixNano"], sent["endTimeUnixNano"]) == ("5", "7")
    assert sent["status"] == {"code": 2, "message": "timeout"}
    assert {pair["key"]: pair["value"] for pair in sent["attributes"]} == {
        "s": {"stringValue": 'a"b'},
        "i": {"intValue": str(2**53 + 1)},
        "f": {"doubleValue": 0.5},
        "b": {"boolValue": True},
        "l": {"arrayValue": {"values": [{"stringValue": "x"}, {"stringValue": "y"}]}},
        "e": {"arrayValue": {"values": []}},
    }


def test_a_spans_links_arrive_with_it(receiver: tuple[Receiver, str]) -> None:
    kept, url = receiver
    traces = provider(url)
    with traces.get_tracer("t").start_as_current_span("context.retrieve") as span:
        span.add_link(PARENT)
    traces.shutdown()
    [sent] = kept.spans()
    assert sent["links"] == [{"traceId": f"{PARENT.trace_id:032x}", "spanId": f"{PARENT.span_id:016x}", "flags": 1}]


def test_many_spans_all_arrive_in_batches(receiver: tuple[Receiver, str]) -> None:
    kept, url = receiver
    traces = provider(url)
    for number in range(1500):
        traces.get_tracer("t").start_span(str(number)).end()
    traces.shutdown()
    assert [span["name"] for span in kept.spans()] == [str(number) for number in range(1500)]
    assert len(kept.requests) >= 3


def test_what_the_parent_did_not_sample_is_not_sent(receiver: tuple[Receiver, str]) -> None:
    kept, url = receiver
    traces = provider(url)
    unsampled = SpanContext(PARENT.trace_id, PARENT.span_id, is_remote=True, trace_flags=TraceFlags(0))
    traces.get_tracer("t").start_span("x", set_span_in_context(NonRecordingSpan(unsampled))).end()
    traces.shutdown()
    assert kept.requests == []


@pytest.mark.parametrize("is_there", [True, False])
def test_a_receiver_that_refuses_costs_nothing_but_spans(receiver: tuple[Receiver, str], is_there: bool) -> None:
    kept, url = receiver
    kept.status = 503
    traces = provider(url if is_there else "http://127.0.0.1:9")
    for _ in range(20_000):
        traces.get_tracer("t").start_span("x").end()
    traces.shutdown()


def test_a_header_that_cannot_be_sent_does_not_end_the_sender(
    receiver: tuple[Receiver, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, url = receiver
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=%D0%BA")
    traces = provider(url)
    traces.get_tracer("t").start_span("x").end()
    [sender] = [thread for thread in threading.enumerate() if thread.name == "otlp"][-1:]
    threading.Event().wait(1.2)
    assert sender.is_alive()
    traces.shutdown()
    assert kept.requests == []


def test_spans_that_nobody_takes_are_bounded_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("extproc.telemetry.otlp._KEPT_BYTES", 10_000)
    monkeypatch.setattr("extproc.telemetry.otlp._SEND_INTERVAL_S", 30)
    processor = OtlpSpanProcessor("http://127.0.0.1:9", Resource({}))
    traces = TracerProvider(shutdown_on_exit=False)
    traces.add_span_processor(processor)
    for _ in range(200):
        traces.get_tracer("t").start_span("x", attributes={"a": "y" * 200}).end()
    assert sum(map(len, processor._spans)) <= 10_000
    traces.shutdown()
