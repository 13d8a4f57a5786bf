"""Nothing of a request without a token is held or read, whatever its shape."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import pytest

from extproc.stack.envoy import Address, Provider
from tests.integration.conftest import StandIn
from tests.integration.gateway.gateway_side import Running, fitting, running
from tests.integration.http_side import AUTHORIZED, JSON, raw

DEEP = b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
"""Crashes the JSON parser of Envoy 1.36.4 and 1.37.0."""
NO_PATHS = [("OPTIONS", "*"), *(("POST", path) for path in ("*", "v1/models", "?x", "http:", "//"))]


@pytest.fixture(scope="module")
def shared(
    envoy_binary: Path, provider_process: StandIn, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    plan = fitting(provider=Provider(provider_process.address))
    with running(envoy_binary, tmp_path_factory.mktemp("strangers"), plan) as gateway:
        yield gateway


def over_http2(address: Address, headers: list[tuple[str, str]], body: bytes) -> tuple[int | None, bytes]:
    """Status and body; None when the stream or connection ended without. It checks nothing that it sends."""
    configuration = h2.config.H2Configuration(validate_outbound_headers=False, normalize_outbound_headers=False)
    wire = h2.connection.H2Connection(configuration)
    wire.initiate_connection()
    wire.send_headers(1, headers)
    status, answer, deadline = None, b"", time.monotonic() + 20
    with socket.create_connection(address, timeout=10) as connection:
        while time.monotonic() < deadline:
            while body and not wire.streams[1].closed and (room := wire.local_flow_control_window(1)):
                piece = body[: min(room, wire.max_outbound_frame_size)]
                body = body[len(piece) :]
                wire.send_data(1, piece, end_stream=not body)
            try:
                connection.sendall(wire.data_to_send())
                received = connection.recv(65536)
            except ConnectionError:
                break
            if not received:
                break
            for event in wire.receive_data(received):
                if isinstance(event, h2.events.ResponseReceived):
                    status = int(dict(event.headers)[b":status"])
                elif isinstance(event, h2.events.DataReceived):
                    answer += event.data
                elif isinstance(event, h2.events.StreamEnded | h2.events.StreamReset | h2.events.ConnectionTerminated):
                    return status, answer
    assert time.monotonic() < deadline, "neither an answer nor an end within 20 s"
    return status, answer


def bodies_read(gateway: Running) -> int:
    """Bodies that Envoy has looked at for a model."""
    lines = gateway.admin("/stats?filter=json_to_metadata").splitlines()
    return sum(int(line.rpartition(": ")[2]) for line in lines)


@pytest.fixture
def unread(shared: Running, provider: StandIn) -> Iterator[Running]:
    """Afterwards Envoy lives, and has shown no body to its JSON parser and nothing to a provider."""
    before = bodies_read(shared)
    yield shared
    assert shared.envoy.process.poll() is None
    assert bodies_read(shared) == before
    assert provider.received() == []


class TestTunnels:
    @pytest.mark.parametrize("given", [{}, AUTHORIZED], ids=["stranger", "known"])
    @pytest.mark.parametrize("body", [DEEP, b"{" + b" " * 9_000_000], ids=["deep", "9 MB"])
    def test_connect_over_http2_is_a_405(self, unread: Running, body: bytes, given: dict[str, str]) -> None:
        headers = [(":method", "CONNECT"), (":authority", "x:443"), *JSON.items(), *given.items()]
        status, answer = over_http2(unread.plan.listen, headers, body)
        assert status == 405
        assert json.loads(answer)["error"]["code"] == "METHOD_NOT_ALLOWED"

    @pytest.mark.parametrize("given", [{}, AUTHORIZED], ids=["stranger", "known"])
    def test_connect_over_http1_is_a_405_at_once(self, unread: Running, given: dict[str, str]) -> None:
        """It has no content-length: what follows is the tunnel."""
        lines = [
            "CONNECT x:443 HTTP/1.1",
            "host: x:443",
            *(f"{name}: {value}" for name, value in (JSON | given).items()),
        ]
        status, _, body = raw(unread.plan.listen, ("\r\n".join([*lines, "", ""])).encode())
        assert status == 405
        assert json.loads(body)["error"]["code"] == "METHOD_NOT_ALLOWED"


class TestNoRoute:
    @pytest.mark.parametrize(("method", "path"), NO_PATHS)
    def test_a_path_that_is_none_is_refused_unread_over_http2(self, unread: Running, method: str, path: str) -> None:
        headers = [(":method", method), (":scheme", "http"), (":authority", "x"), (":path", path), *JSON.items()]
        status, _ = over_http2(unread.plan.listen, headers, DEEP)
        assert status in {None, 400, 401, 404}

    @pytest.mark.parametrize(("method", "path"), [*NO_PATHS, ("POST", "http://x")])
    def test_a_path_that_is_none_is_refused_unread_over_http1(self, unread: Running, method: str, path: str) -> None:
        head = (
            f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 400000\r\n\r\n"
        )
        status, _, _ = raw(unread.plan.listen, head.encode())
        assert status in {400, 401, 404}
