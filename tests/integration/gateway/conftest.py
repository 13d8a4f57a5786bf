"""A provider behind TLS whose authority these tests know: an Envoy that speaks for the stand-in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from extproc.stack import certs, envoy
from extproc.stack.envoy import Address
from tests.integration.conftest import StandIn
from tests.integration.gateway.gateway_side import front, gates


@dataclass(frozen=True)
class TlsProvider:
    address: Address
    ca_file: Path
    stand_in: StandIn


@pytest.fixture(scope="session", autouse=True)
def gate(gate_address: Address) -> None:
    gates[:] = [gate_address]


@pytest.fixture(scope="session")
def tls_front(
    envoy_binary: Path, provider_process: StandIn, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TlsProvider]:
    directory = tmp_path_factory.mktemp("front")
    pair = certs.make(directory, ["localhost"])
    with front(envoy_binary, directory, envoy.Certificate(pair.chain, pair.key), provider_process.address) as address:
        yield TlsProvider(address, pair.authority, provider_process)


@pytest.fixture
def tls_provider(tls_front: TlsProvider, provider: StandIn) -> TlsProvider:
    return tls_front
