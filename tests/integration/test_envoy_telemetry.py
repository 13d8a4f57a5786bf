"""What operators see: access log, spans, counters; and HTTP/2 clients."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from extproc.stack import envoy as stack
from extproc.stack.envoy import Address
from tests.integration.conftest import Gateway, StandIn, started
from tests.integration.http_side import AUTHORIZED, HEALTHY, TOKEN, check_envelope, context
from tests.integration.otlp import Receiver, receive_spans
from tests.integration.processor import Processor, default_answer

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"


class TestAccessLog:
    def test_says_what_the_filter_did(self, gateway: Gateway) -> None:
        response = gateway.chat()
        entry = gateway.access_log(response.headers["x-request-id"])
        assert entry["status"] == 200
        assert entry["route"] == "openai"
        assert entry["cluster"] == "provider_openai"
        assert (entry["outcome"], entry["memories"], entry["tokens"], entry["assemble_ms"]) == ("injected", 7, 70, 1.5)
        times = entry["filter"]
        for phase in ("request_header_call", "request_body_last_call", "response_header_call"):
            assert times[f"{phase}_status"] == 0
        for phase in ("request_header", "request_body_total", "response_header"):
            assert times[f"{phase}_latency_us"] > 0

    def test_says_that_the_filter_was_not_there(self, unserved_gateway: Gateway) -> None:
        entry = unserved_gateway.access_log(unserved_gateway.chat().headers["x-request-id"])
        assert entry["outcome"] is None
        assert entry["filter"]["request_header_call_status"] == 14

    def test_says_that_the_filter_was_slow(self, gateway: Gateway, processor: Processor) -> None:
        def answer(message: pb.ProcessingRequest) -> pb.ProcessingResponse:
            if message.WhichOneof("request") == "request_body":
                is_over.wait(30)
            return default_answer(message)

        is_over = threading.Event()
        processor.answer = answer
        entry = gateway.access_log(gateway.chat().headers["x-request-id"])
        is_over.set()
        assert entry["filter"]["request_body_last_call_status"] == 4
        assert entry["outcome"] is None

    def test_holds_no_content(self, gateway: Gateway) -> None:
        response = gateway.post(
            "/v1/chat/completions?key=s3cret-query",
            json={"model": "gpt-4o", "messages": [{"role": "user", "content": "s3cret-body"}]},
            headers={"x-api-key": TOKEN, "proxy-authorization": "s3cret-token", "cookie": "s3cret-cookie"},
        )
        assert response.status_code == 200
        entry = gateway.access_log(response.headers["x-request-id"])
        assert entry["path"] == "/v1/chat/completions"
        assert TOKEN not in gateway.envoy.access_log_file.read_text() + gateway.envoy.log_file.read_text()
        assert "s3cret" not in gateway.envoy.access_log_file.read_text()
        assert "s3cret" not in gateway.envoy.log_file.read_text()

    def test_says_what_the_gate_said(self, gateway: Gateway) -> None:
        entry = gateway.access_log(gateway.chat().headers["x-request-id"])
        assert (entry["gate"], entry["gate_code"]) == ("allowed", None)
        refused = gateway.chat(headers={"authorization": ""})
        check_envelope(refused, 401, "MISSING_TOKEN")
        entry = gateway.access_log(refused.headers["x-request-id"])
        assert (entry["gate"], entry["gate_code"]) == ("denied", "MISSING_TOKEN")

    def test_a_long_path_is_cut(self, gateway: Gateway) -> None:
        response = gateway.client.get("/v1/" + "x" * 20_000)
        assert len(gateway.access_log(response.headers["x-request-id"])["path"]) == 256


def test_counters_carry_the_filters_name(gateway: Gateway) -> None:
    before = gateway.stat("http.gateway.ext_proc.context.streams_started")
    gateway.chat()
    assert gateway.stat("http.gateway.ext_proc.context.streams_started") == before + 1


class TestHttp2:
    def test_a_client_may_speak_http_2(self, either: Gateway, provider: StandIn) -> None:
        with httpx2.Client(base_url=either.url, http1=False, http2=True, timeout=10, headers=AUTHORIZED) as client:
            body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "over HTTP/2"}]}
            response = client.post("/v1/chat/completions", json=body)
        assert response.http_version == "HTTP/2"
        assert context(response) == HEALTHY
        assert "over HTTP/2" in response.text

    def test_an_error_is_the_same(self, gateway: Gateway) -> None:
        with httpx2.Client(base_url=gateway.url, http1=False, http2=True, timeout=10, headers=AUTHORIZED) as client:
            response = client.post("/v1/chat/completions", json={"model": "nobody"})
        assert response.json()["error"]["code"] == "PROVIDER_NOT_CONFIGURED"
        context(response)


@pytest.fixture
def spans() -> Iterator[Receiver]:
    with receive_spans() as receiver:
        yield receiver


class TestTracing:
    def test_the_filter_continues_envoys_span(
        self,
        envoy_binary: Path,
        processor: Processor,
        processor_address: Address,
        gate_address: Address,
        provider: StandIn,
        spans: Receiver,
        tmp_path: Path,
    ) -> None:
        address = Address.parse(spans.url.removeprefix("http://"))
        filters, where = [processor_address], provider.address
        with started(
            envoy_binary, "envoy.yaml", tmp_path, filters, where, collector=address, gate=gate_address
        ) as gateway:
            url = "/v1/chat/completions?key=s3cret-key"
            body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hello"}]}
            request_id = "3d1c8a5e-7f24-4c11-8a5e-7f244c118a5e"
            sent = {"traceparent": TRACEPARENT, "x-request-id": request_id}
            response = gateway.post(url, json=body, headers=sent)
            assert context(response) == HEALTHY
            assert response.headers["x-request-id"] == request_id, "kept to the digit"
            version, trace_id, span_id, flags = processor.streams[-1].metadata["traceparent"].split("-")
            assert (version, trace_id, flags) == ("00", TRACE_ID, "01")
            assert span_id != "00f067aa0ba902b7"
            assert gateway.access_log(response.headers["x-request-id"])["trace_id"] == TRACE_ID
            span = spans.wait_for(lambda span: span.span_id == span_id)
            assert (span.service, span.trace_id) == ("ibex-gateway", TRACE_ID)
            unnamed = gateway.chat(headers={"x-request-id": "hello"})
            assert unnamed.status_code == 200
            spans.wait_for(lambda span: unnamed.headers["x-request-id"] in str(span.attributes) + span.trace_id)
        assert not any(b"hello" in export or b"s3cret" in export for export in spans.raw)

    def test_an_absent_collector_costs_nothing(
        self,
        envoy_binary: Path,
        processor: Processor,
        processor_address: Address,
        gate_address: Address,
        provider: StandIn,
        tmp_path: Path,
    ) -> None:
        """As shipped: over gRPC."""
        nobody = Address("127.0.0.1", stack.free_port())
        shipped = stack.load(stack.shipped("envoy.yaml"))
        stack.set_cluster(shipped, stack.COLLECTOR_CLUSTER, [nobody])

        def trace_as_shipped(config: stack.Node) -> None:
            ours, theirs = (stack._http_managers(node)[0] for node in (config, shipped))
            ours["tracing"] = theirs["tracing"]
            config["static_resources"]["clusters"].append(stack._cluster(shipped, stack.COLLECTOR_CLUSTER))

        filters, where = [processor_address], provider.address
        with started(
            envoy_binary, "envoy.yaml", tmp_path, filters, where, trace_as_shipped, gate=gate_address
        ) as gateway:
            assert all(context(gateway.chat()) == HEALTHY for _ in range(50))
            threading.Event().wait(2)
            lines = [
                line for line in gateway.envoy.log_file.read_text().splitlines() if "downstream connections" not in line
            ]
            assert len(lines) < 5, lines

    def test_without_a_collector_the_clients_traceparent_still_comes(
        self, gateway: Gateway, processor: Processor
    ) -> None:
        gateway.chat(headers={"traceparent": TRACEPARENT})
        assert processor.streams[-1].header("traceparent") == TRACEPARENT
