"""`--provider URL`: every provider cluster at one address, over TLS that is checked."""

from __future__ import annotations

import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import trustme

from extproc.stack import envoy as stack
from extproc.stack.envoy import Address, Provider
from tests.integration.conftest import Gateway, StandIn, running, started
from tests.integration.http_side import HEALTHY, check_envelope, context
from tests.integration.processor import Processor

GatewayTo = Callable[[Provider], AbstractContextManager[Gateway]]


@dataclass(frozen=True)
class TlsStandIn:
    port: int
    ca_file: Path


@pytest.fixture(scope="session")
def tls_provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsStandIn]:
    """The stand-in behind a certificate for `localhost` of an authority that only this test knows."""
    directory = tmp_path_factory.mktemp("tls")
    key, certificate, ca_file = (directory / name for name in ("key.pem", "certificate.pem", "ca.pem"))
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    issued.private_key_pem.write_to_path(str(key))
    issued.cert_chain_pems[0].write_to_path(str(certificate))
    authority.cert_pem.write_to_path(str(ca_file))
    port = stack.free_port()
    server = [sys.executable, "-m", "uvicorn", "--factory", "extproc.stack.provider:create_app", "--log-level", "error"]
    server += ["--port", str(port), "--ssl-keyfile", str(key), "--ssl-certfile", str(certificate)]
    with running(server, lambda: is_listening(port)):
        yield TlsStandIn(port, ca_file)


def is_listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def received_path(provider: TlsStandIn) -> tuple[str, str]:
    """Path and Host header of the last request that reached the provider."""
    trust = ssl.create_default_context(cafile=provider.ca_file)
    with httpx2.Client(verify=trust) as client:
        entry = client.get(f"https://localhost:{provider.port}/received").json()[-1]
    return entry["path"], dict(entry["headers"])["host"]


class TestTls:
    @pytest.fixture
    def gateway_to(
        self,
        envoy_binary: Path,
        processor: Processor,
        processor_address: Address,
        gate_address: Address,
        tmp_path: Path,
    ) -> GatewayTo:
        def start(provider: Provider) -> AbstractContextManager[Gateway]:
            return started(envoy_binary, "envoy.yaml", tmp_path, [processor_address], provider, gate=gate_address)

        return start

    def test_a_trusted_provider_answers(self, gateway_to: GatewayTo, tls_provider: TlsStandIn) -> None:
        url = f"https://localhost:{tls_provider.port}/v1"
        with gateway_to(Provider.parse(url, tls_provider.ca_file)) as gateway:
            response = gateway.chat()
            assert response.status_code == 200
            assert context(response) == HEALTHY
            assert received_path(tls_provider) == ("/v1/chat/completions", f"localhost:{tls_provider.port}")

    def test_a_base_path_comes_first(self, gateway_to: GatewayTo, tls_provider: TlsStandIn) -> None:
        url = f"https://localhost:{tls_provider.port}/base/v1"
        with gateway_to(Provider.parse(url, tls_provider.ca_file)) as gateway:
            gateway.post("/v1/chat/completions?a=b", json={"model": "gpt-4o"})
            assert received_path(tls_provider)[0] == "/base/v1/chat/completions?a=b"

    def test_a_provider_that_nobody_vouches_for_is_refused(
        self, gateway_to: GatewayTo, tls_provider: TlsStandIn
    ) -> None:
        with gateway_to(Provider.parse(f"https://localhost:{tls_provider.port}")) as gateway:
            check_envelope(gateway.chat(), 503, "PROVIDER_UNAVAILABLE")

    def test_a_certificate_for_another_host_is_refused(self, gateway_to: GatewayTo, tls_provider: TlsStandIn) -> None:
        with gateway_to(Provider.parse(f"https://127.0.0.1:{tls_provider.port}", tls_provider.ca_file)) as gateway:
            check_envelope(gateway.chat(), 503, "PROVIDER_UNAVAILABLE")


def test_plain_http_by_name(
    envoy_binary: Path, processor: Processor, processor_address: Address, provider: StandIn, tmp_path: Path
) -> None:
    url = f"http://localhost:{provider.address.port}"
    with started(envoy_binary, "dropin.yaml", tmp_path, [processor_address], Provider.parse(url)) as gateway:
        assert gateway.chat().status_code == 200
        assert ("host", f"localhost:{provider.address.port}") in provider.last().headers


def test_one_provider_for_every_model(
    envoy_binary: Path,
    processor: Processor,
    processor_address: Address,
    gate_address: Address,
    provider: StandIn,
    tmp_path: Path,
) -> None:
    """As `extproc up --provider` has it: whether there is such a model is the provider's to say."""
    filters, change = [processor_address], stack.route_any_model
    with started(envoy_binary, "envoy.yaml", tmp_path, filters, provider.address, change, gate=gate_address) as gateway:
        response = gateway.post("/v1/chat/completions", json={"model": "llama3", "messages": []})
        assert (response.status_code, response.json()["model"]) == (200, "llama3")
        assert context(response) == HEALTHY
