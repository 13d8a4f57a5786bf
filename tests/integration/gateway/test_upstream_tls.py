"""Towards providers: HTTP/2 where offered, and not one byte to anybody whose certificate is not in order."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme

from extproc.stack import envoy
from extproc.stack.envoy import Address, Provider
from tests.integration.gateway.conftest import TlsProvider
from tests.integration.gateway.gateway_side import as_shipped_to, fitting, provider_clusters, running
from tests.integration.http_side import check_envelope

CANARY = "canary-in-the-body"


class Impostor:
    """A TLS server that remembers every byte it is sent."""

    def __init__(self, certificate: trustme.LeafCert) -> None:
        self.received = b""
        self.attempts = 0
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(self._context)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.1)
        self.port: int = self._listener.getsockname()[1]

    @contextmanager
    def serving(self) -> Iterator[None]:
        stopping = threading.Event()
        thread = threading.Thread(target=self._serve, args=(stopping,))
        thread.start()
        try:
            yield
        finally:
            stopping.set()
            thread.join(10)
            self._listener.close()

    def _serve(self, stopping: threading.Event) -> None:
        while not stopping.is_set():
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            self.attempts += 1
            connection.settimeout(2)
            with connection:
                try:
                    with self._context.wrap_socket(connection, server_side=True) as encrypted:
                        while chunk := encrypted.recv(65536):
                            self.received += chunk
                            encrypted.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
                except (OSError, ssl.SSLError):
                    continue


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> Path:
    file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(file))
    return file


def ask(binary: Path, directory: Path, impostor: Impostor, ca_file: Path, *, shipped: bool) -> tuple[int, str, str]:
    """Status, error code, and what the access log says of the connection."""
    address = Address("localhost", impostor.port)
    plan = fitting(provider=None if shipped else Provider(address, tls=True, ca_file=ca_file))
    change = as_shipped_to(address, ca_file) if shipped else None
    with impostor.serving(), running(binary, directory, plan, change=change) as gateway:
        response = gateway.client.post("/v1/chat/completions", json={"model": "gpt-4o", "messages": [CANARY]})
        if response.status_code != 200:
            check_envelope(response, 503, "PROVIDER_UNAVAILABLE")
        line = gateway.access_log(response.headers["x-request-id"])
        return response.status_code, response.text, str(line["upstream_failure"])


BAD: dict[str, Callable[[trustme.CA], trustme.LeafCert]] = {
    "wrong authority": lambda _: trustme.CA().issue_cert("localhost"),
    "wrong name": lambda ca: ca.issue_cert("api.openai.com.example.org"),
    "address in place of a name": lambda ca: ca.issue_cert("127.0.0.1"),
    "expired": lambda ca: ca.issue_cert(
        "localhost",
        not_before=datetime.now(UTC) - timedelta(days=2),
        not_after=datetime.now(UTC) - timedelta(days=1),
    ),
    "not valid yet": lambda ca: ca.issue_cert("localhost", not_before=datetime.now(UTC) + timedelta(days=1)),
}


@pytest.mark.parametrize("shipped", [True, False], ids=["as shipped", "given by URL"])
class TestCertificate:
    def test_in_order(
        self, envoy_binary: Path, tmp_path: Path, authority: trustme.CA, ca_file: Path, shipped: bool
    ) -> None:
        """The same server as below, so that there it is the certificate and nothing else that is refused."""
        impostor = Impostor(authority.issue_cert("localhost"))
        status, _, _ = ask(envoy_binary, tmp_path, impostor, ca_file, shipped=shipped)
        assert status == 200
        assert CANARY.encode() in impostor.received

    @pytest.mark.parametrize("fault", BAD)
    def test_not_in_order(
        self, envoy_binary: Path, tmp_path: Path, authority: trustme.CA, ca_file: Path, shipped: bool, fault: str
    ) -> None:
        impostor = Impostor(BAD[fault](authority))
        status, text, failure = ask(envoy_binary, tmp_path, impostor, ca_file, shipped=shipped)
        assert status == 503
        assert impostor.attempts > 0
        assert impostor.received == b""
        assert "TLS" in failure
        assert "TLS" not in text, "why is for the log"


def test_every_hosted_provider_is_checked_alike() -> None:
    clusters = {one["name"]: one for one in provider_clusters(envoy.load(envoy.shipped("envoy.yaml")))}
    assert set(clusters) == {"provider_openai", "provider_anthropic", "provider_gemini", "provider_selfhosted"}
    local = clusters.pop("provider_selfhosted")
    assert "transport_socket" not in local
    (openai, *others) = clusters.values()
    for cluster in others:
        assert cluster["transport_socket"] == openai["transport_socket"]


class TestProtocol:
    def test_http2_where_it_is_offered(self, envoy_binary: Path, tmp_path: Path, tls_provider: TlsProvider) -> None:
        change = as_shipped_to(tls_provider.address, tls_provider.ca_file)
        with running(envoy_binary, tmp_path, fitting(), change=change) as gateway:
            assert gateway.chat().status_code == 200
        received = dict(tls_provider.stand_in.last().headers)
        assert received["x-front-protocol"] == "HTTP/2"
        assert received["x-front-server-name"] == "localhost"
        assert received["host"] == "localhost"

    def test_http2_to_a_given_provider(self, envoy_binary: Path, tmp_path: Path, tls_provider: TlsProvider) -> None:
        provider = Provider(tls_provider.address, tls=True, ca_file=tls_provider.ca_file)
        with running(envoy_binary, tmp_path, fitting(provider=provider)) as gateway:
            assert gateway.chat().status_code == 200
        received = dict(tls_provider.stand_in.last().headers)
        assert received["x-front-protocol"] == "HTTP/2"
        assert received["host"] == f"localhost:{tls_provider.address.port}"

    def test_a_stream_comes_through_it_piece_by_piece(
        self, envoy_binary: Path, tmp_path: Path, tls_provider: TlsProvider
    ) -> None:
        change = as_shipped_to(tls_provider.address, tls_provider.ca_file)
        body = {"model": "claude-x", "max_tokens": 9, "stream": True, "messages": [{"role": "user", "content": "hi"}]}
        with (
            running(envoy_binary, tmp_path, fitting(), change=change) as gateway,
            gateway.client.stream("POST", "/v1/messages", json=body) as response,
        ):
            lines = [line for line in response.iter_lines() if line.startswith("event:")]
        assert lines[0] == "event: message_start"
        assert lines[-1] == "event: message_stop"


def test_it_starts_where_no_name_can_be_resolved(envoy_binary: Path, tmp_path: Path) -> None:
    """As on a laptop without network: the gateway is there, its providers are not."""

    def nowhere(config: envoy.Node) -> None:
        for cluster in provider_clusters(config):
            envoy.set_cluster(config, cluster["name"], [Address("provider.invalid", 443)])

    with running(envoy_binary, tmp_path, fitting(), change=nowhere) as gateway:
        check_envelope(gateway.chat(), 503, "PROVIDER_UNAVAILABLE")
