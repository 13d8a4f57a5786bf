"""HTTPS in front, with the certificate that `extproc envoy certs` makes."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from extproc.stack import certs, envoy
from extproc.stack.envoy import Provider
from tests.integration.conftest import StandIn
from tests.integration.gateway.gateway_side import Running, fitting, running
from tests.integration.http_side import AUTHORIZED, check_envelope


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> certs.Pair:
    return certs.make(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def https(
    envoy_binary: Path, provider_process: StandIn, pair: certs.Pair, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    plan = fitting(provider=Provider(provider_process.address), tls=envoy.Certificate(pair.chain, pair.key))
    trust = ssl.create_default_context(cafile=pair.authority)
    with running(envoy_binary, tmp_path_factory.mktemp("https"), plan, verify=trust) as gateway:
        yield gateway


def handshake(gateway: Running, context: ssl.SSLContext, name: str = "localhost") -> ssl.SSLSocket:
    connection = socket.create_connection(gateway.plan.listen, timeout=10)
    try:
        return context.wrap_socket(connection, server_hostname=name)
    except BaseException:
        connection.close()
        raise


def client(pair: certs.Pair) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=pair.authority)


@pytest.mark.parametrize("http2", [False, True])
def test_a_client_that_trusts_the_authority_is_answered(https: Running, pair: certs.Pair, http2: bool) -> None:
    with httpx2.Client(base_url=https.client.base_url, verify=client(pair), http1=not http2, http2=http2) as one:
        one.headers.update(AUTHORIZED)
        response = one.post("/v1/chat/completions", json={"model": "gpt-4o", "messages": []})
    assert response.status_code == 200
    assert response.http_version == ("HTTP/2" if http2 else "HTTP/1.1")


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_the_certificate_is_for_this_machine(https: Running, pair: certs.Pair, name: str) -> None:
    with handshake(https, client(pair), name) as connection:
        assert connection.version() == "TLSv1.3"


def test_http2_is_preferred(https: Running, pair: certs.Pair) -> None:
    context = client(pair)
    context.set_alpn_protocols(["http/1.1", "h2"])
    with handshake(https, context) as connection:
        assert connection.selected_alpn_protocol() == "h2"


def test_tls_1_2_has_forward_secrecy(https: Running, pair: certs.Pair) -> None:
    context = client(pair)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with handshake(https, context) as connection:
        cipher = connection.cipher()
        assert cipher is not None
        assert cipher[0].startswith("ECDHE-")
        assert cipher[0].endswith(("GCM-SHA256", "GCM-SHA384", "POLY1305"))


@pytest.mark.parametrize("ciphers", ["ECDHE+AES+SHA:!AESGCM", "kRSA"])
def test_a_weak_cipher_is_refused(https: Running, pair: certs.Pair, ciphers: str) -> None:
    context = client(pair)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(ciphers + ":@SECLEVEL=0")
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        handshake(https, context).close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tls_1_1_is_refused(https: Running, pair: certs.Pair) -> None:
    context = client(pair)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        handshake(https, context).close()


def test_plain_http_is_not_answered(https: Running) -> None:
    with pytest.raises(httpx2.TransportError):
        httpx2.get(f"http://localhost:{https.plan.listen.port}/v1/models")


def test_an_error_has_its_envelope(https: Running) -> None:
    check_envelope(https.client.get("/nowhere"), 404, "NOT_FOUND")


def test_a_client_that_does_not_know_the_authority_refuses(https: Running) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(https, ssl.create_default_context()).close()
