"""An OTLP/HTTP receiver: takes what Envoy (protobuf) and the processes (JSON) send to `/v1/traces`, and keeps it."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from typing_extensions import override


@dataclass(frozen=True)
class ReceivedSpan:
    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    """Empty for a root. Ids in lower-case hexadecimal."""
    attributes: dict[str, Any]
    links: tuple[tuple[str, str], ...] = ()
    """Trace id and span id of each."""


@dataclass
class Receiver:
    url: str = ""
    spans: list[ReceivedSpan] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)

    def take(self, content_type: str, body: bytes) -> None:
        self.raw.append(body)
        if content_type.startswith("application/json"):
            self._take(json.loads(body), lambda identifier: identifier)
        else:
            message = trace_service_pb2.ExportTraceServiceRequest.FromString(body)  # type: ignore[attr-defined]  # made at import
            self._take(json_format.MessageToDict(message), lambda text: base64.b64decode(text).hex())

    def _take(self, request: dict[str, Any], read_id: Callable[[str], str]) -> None:
        for resource in request["resourceSpans"]:
            service = _attributes(resource["resource"]).get("service.name", "")
            # The older of the two names is what xds-protos calls the same field of the wire.
            for scope in resource.get("scopeSpans", resource.get("instrumentationLibrarySpans", [])):
                self.spans += [
                    ReceivedSpan(
                        service,
                        span["name"],
                        read_id(span["traceId"]).lower(),
                        read_id(span["spanId"]).lower(),
                        read_id(span.get("parentSpanId", "")).lower(),
                        _attributes(span),
                        tuple(
                            (read_id(link["traceId"]).lower(), read_id(link["spanId"]).lower())
                            for link in span.get("links", [])
                        ),
                    )
                    for span in scope["spans"]
                ]

    def wait_for(self, is_wanted: Callable[[ReceivedSpan], bool], timeout_s: float = 45.0) -> ReceivedSpan:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for span in list(self.spans):
                if is_wanted(span):
                    return span
            time.sleep(0.05)
        raise AssertionError(f"no such span among {sorted({(span.service, span.name) for span in self.spans})}")


def _attributes(node: dict[str, Any]) -> dict[str, Any]:
    return {pair["key"]: _value(pair["value"]) for pair in node.get("attributes", [])}


def _value(value: dict[str, Any]) -> Any:
    [(kind, content)] = value.items()
    return [_value(item) for item in content.get("values", [])] if kind == "arrayValue" else content


@contextmanager
def receive_spans() -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            receiver.take(self.headers["content-type"], self.read_body())
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def read_body(self) -> bytes:
            if self.headers["transfer-encoding"] != "chunked":  # as Envoy sends
                return self.rfile.read(int(self.headers["content-length"]))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        @override
        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield receiver
        server.shutdown()
        thread.join(10)
