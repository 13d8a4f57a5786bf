"""When something is broken: the client's request, the provider, the filter."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from extproc.stack import envoy as stack
from extproc.stack.envoy import Address
from tests.integration.conftest import Change, Gateway, StandIn, running, started
from tests.integration.http_side import (
    AUTHORIZED,
    CONTEXT_HEADERS,
    HEALTHY,
    JSON,
    NOT_ASKED,
    UUID,
    check_envelope,
    context,
    raw,
    request_bytes,
)
from tests.integration.processor import Processor, default_answer

ROOT = Path(__file__).parents[2]
GatewayTo = Callable[..., AbstractContextManager[Gateway]]


@pytest.fixture
def gateway_to(
    envoy_binary: Path, processor: Processor, processor_address: Address, gate_address: Address, tmp_path: Path
) -> GatewayTo:
    """envoy.yaml with another provider, or a change."""

    def start(provider: Address, change: Change | None = None) -> AbstractContextManager[Gateway]:
        filters = [processor_address]
        return started(envoy_binary, "envoy.yaml", tmp_path, filters, provider, change, gate=gate_address)

    return start


@contextmanager
def answering(listener: socket.socket, answer: bytes) -> Iterator[None]:
    """Take one connection, read what comes first, send these bytes and close."""

    def serve() -> None:
        listener.settimeout(10)
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    yield
    thread.join(10)


class TestErrors:
    @pytest.mark.parametrize("status", [400, 401, 404, 413, 429, 500, 501, 502, 503, 504, 529])
    def test_a_providers_error_passes_unchanged(self, either: Gateway, status: int) -> None:
        response = either.chat(headers={"x-standin-status": str(status)})
        assert response.status_code == status
        assert response.json()["error"]["message"] == f"The request asked for status {status}."
        assert context(response) == HEALTHY

    def test_an_unknown_path_is_a_404(self, gateway: Gateway) -> None:
        for path in ("/", "/v2/chat", "/v1", "/v1/../etc/passwd"):
            check_envelope(gateway.client.get(path), 404, "NOT_FOUND")

    @pytest.mark.parametrize("path", ["/v1//chat/completions", "/v1/x/../chat/completions", "/./v1/chat/completions"])
    def test_another_spelling_of_a_chat_path_is_a_chat_path(
        self, gateway: Gateway, processor: Processor, path: str
    ) -> None:
        status, _, _ = raw(gateway.address, request_bytes("POST", path, JSON | AUTHORIZED, b'{"model":"gpt-4o"}'))
        assert status == 200
        assert "request_body" in processor.streams[-1].kinds

    def test_a_dead_provider_is_a_503(self, gateway_to: GatewayTo) -> None:
        with gateway_to(Address("127.0.0.1", stack.free_port())) as gateway:
            response = gateway.chat()
            check_envelope(response, 503, "PROVIDER_UNAVAILABLE")
            assert response.json()["error"]["message"] == "The provider cannot be reached."

    def test_a_provider_that_breaks_the_protocol_is_a_503(self, gateway_to: GatewayTo) -> None:
        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            gateway_to(Address(*listener.getsockname())) as gateway,
            answering(listener, b"SSH-2.0-OpenSSH\r\n\r\n"),
        ):
            check_envelope(gateway.chat(), 503, "PROVIDER_UNAVAILABLE")

    def test_a_silent_provider_is_a_504(self, gateway_to: GatewayTo) -> None:
        def shorten(config: stack.Node) -> None:
            stack._http_managers(config)[0]["stream_idle_timeout"] = "0.5s"

        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            gateway_to(Address(*listener.getsockname()), shorten) as gateway,
        ):
            check_envelope(gateway.chat(), 504, "PROVIDER_TIMEOUT")

    @pytest.mark.parametrize(
        "sent",
        [
            b"GET / HTTP/1.1\r\n\r\n",
            b"GET /v1/models HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
            b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 70_000 + b"\r\n\r\n",
            b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            b"GET http://[ HTTP/1.1\r\nhost: x\r\n\r\n",
            b"GET /v1/realtime HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
        ],
    )
    def test_a_malformed_request_gets_an_envelope(self, gateway: Gateway, sent: bytes) -> None:
        status, headers, body = raw(gateway.address, sent)
        assert 400 <= status < 500
        assert tuple(headers[name] for name in CONTEXT_HEADERS)
        assert json.loads(body)["error"]["code"] == "VALIDATION_ERROR"
        assert (json.loads(body)["error"]["request_id"] or "") == headers.get("x-request-id", "")


class TestFilterIsBroken:
    def test_dead(self, unserved_gateway: Gateway, provider: StandIn) -> None:
        response = unserved_gateway.chat()
        assert response.status_code == 200
        assert context(response) == NOT_ASKED
        assert UUID.fullmatch(response.headers["x-request-id"])

    def test_dead_and_a_body_that_nobody_can_read(self, unserved_gateway: Gateway) -> None:
        response = unserved_gateway.post("/v1/chat/completions", content=b"{", headers=JSON)
        check_envelope(response, 400, "INVALID_JSON")
        assert context(response) == NOT_ASKED

    def test_slow_to_answer_the_body(self, either: Gateway, processor: Processor, provider: StandIn) -> None:
        is_over = threading.Event()

        def answer(message: pb.ProcessingRequest) -> pb.ProcessingResponse:
            if message.WhichOneof("request") == "request_body":
                is_over.wait(30)
            return default_answer(message)

        processor.answer = answer
        response = either.chat()  # and the filter still waits
        is_over.set()
        assert response.status_code == 200
        assert context(response) == NOT_ASKED
        assert json.loads(provider.last().body)["messages"] == [{"role": "user", "content": "hello"}]

    def test_raises(self, either: Gateway, processor: Processor) -> None:
        def answer(message: pb.ProcessingRequest) -> pb.ProcessingResponse:
            raise RuntimeError("a bug")

        processor.answer = answer
        response = either.chat()
        assert response.status_code == 200
        assert context(response) == NOT_ASKED

    def test_answers_the_wrong_question(self, either: Gateway, processor: Processor) -> None:
        processor.answer = lambda _: pb.ProcessingResponse(response_headers=pb.HeadersResponse())
        response = either.chat()
        assert response.status_code == 200
        assert context(response) == NOT_ASKED

    def test_frozen_and_awake_again(
        self, envoy_binary: Path, gate_address: Address, provider: StandIn, tmp_path: Path
    ) -> None:
        """Each request waits for message_timeout once and goes on; an awake filter is asked again."""
        address = Address("127.0.0.1", stack.free_port())
        command = [sys.executable, "-m", "tests.integration.processor", str(address)]
        with (
            running(command, lambda: is_listening(address), cwd=ROOT) as process,
            started(
                envoy_binary, "envoy.yaml", tmp_path, [address], provider.address, gate=gate_address, is_patient=False
            ) as gateway,
        ):
            assert eventually(lambda: context(gateway.chat()) == HEALTHY)
            os.kill(process.pid, signal.SIGSTOP)
            times = []
            for _ in range(3):
                begun = time.monotonic()
                response = gateway.chat()
                times.append(time.monotonic() - begun)
                assert response.status_code == 200
                assert context(response) == NOT_ASKED
            assert all(0.09 < seconds < 10 for seconds in times), "message_timeout, and what a busy machine adds"
            assert eventually(lambda: gateway.stat("cluster.extproc_filter.http2.keepalive_timeout") > 0)
            os.kill(process.pid, signal.SIGCONT)
            assert eventually(lambda: context(gateway.chat()) == HEALTHY)

    def test_killed_in_the_middle(self, envoy_binary: Path, provider: StandIn, tmp_path: Path) -> None:
        address = Address("127.0.0.1", stack.free_port())
        command = [sys.executable, "-m", "tests.integration.processor", str(address)]
        with (
            running(command, lambda: is_listening(address), cwd=ROOT) as process,
            started(envoy_binary, "dropin.yaml", tmp_path, [address], provider.address, is_patient=False) as gateway,
        ):
            assert eventually(lambda: context(gateway.chat()) == HEALTHY)
            process.kill()
            process.wait(10)
            for _ in range(3):
                response = gateway.chat()
                assert response.status_code == 200
                assert context(response) == NOT_ASKED


def eventually(is_so: Callable[[], bool]) -> bool:
    """Asked again for 45 s at most."""
    deadline = time.monotonic() + 45
    while not (answer := is_so()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return answer


def is_listening(address: Address) -> bool:
    try:
        socket.create_connection(address, timeout=1).close()
    except OSError:
        return False
    return True
