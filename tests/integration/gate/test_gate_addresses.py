"""Which address the gate is told, by a real Envoy with the shipped filter: what the guard counts by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from extproc.gate import wire
from extproc.gate.passage import Deny
from extproc.gate.service import SERVICE_NAME
from extproc.gate.verdict import MISSING_TOKEN
from extproc.stack import envoy
from extproc.stack.envoy import Address
from tests.integration.conftest import Gateway, StandIn, started


@dataclass
class Listener:
    """A gate that refuses everybody and keeps the address that it was told."""

    gateway: Gateway
    addresses: list[str] = field(default_factory=list)

    def address_of(self, **headers: str) -> str:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        assert self.gateway.client.get("/v1/models", headers=sent).status_code == 401
        return self.addresses[-1]


Opened = Callable[[envoy.Node], AbstractContextManager[Listener]]


@pytest.fixture
def opened(envoy_binary: Path, provider: StandIn, processor_address: Address, tmp_path: Path) -> Opened:
    @contextmanager
    def open_with(manager: envoy.Node) -> Iterator[Listener]:
        """`manager`: changes to the settings of Envoy's HTTP connection manager."""
        addresses: list[str] = []

        def check(raw: bytes, _context: Any) -> bytes:
            addresses.append(wire.read_request(raw, frozenset((wire.ADDRESS_HEADER,))).address)
            return wire.deny(Deny(MISSING_TOKEN), "", 0.0)

        def change(config: envoy.Node) -> None:
            [found] = envoy._http_managers(config)
            found.update(manager)
            del envoy._cluster(config, envoy.GATE_CLUSTER)["health_checks"]

        server = grpc.server(ThreadPoolExecutor(2))
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(check)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, {"Check": handler}),))
        gate = Address("127.0.0.1", server.add_insecure_port("127.0.0.1:0"))
        server.start()
        try:
            filters, where = [processor_address], provider.address
            with started(envoy_binary, "envoy.yaml", tmp_path, filters, where, change, gate=gate) as gateway:
                yield Listener(gateway, addresses)
        finally:
            server.stop(0).wait(5)

    return open_with


def test_it_is_the_connections_whatever_a_client_says(opened: Opened) -> None:
    with opened({}) as listener:
        assert listener.address_of() == "127.0.0.1"
        assert listener.address_of(x_envoy_external_address="203.0.113.9") == "127.0.0.1"
        assert listener.address_of(x_forwarded_for="203.0.113.9") == "127.0.0.1"


def test_behind_a_load_balancer_it_is_the_one_that_the_balancer_saw(opened: Opened) -> None:
    with opened({"xff_num_trusted_hops": 1}) as listener:
        assert listener.address_of(x_forwarded_for="203.0.113.9") == "203.0.113.9"
        assert listener.address_of(x_forwarded_for="6.6.6.6, 203.0.113.9") == "203.0.113.9"
        assert listener.address_of(x_envoy_external_address="6.6.6.6", x_forwarded_for="203.0.113.9") == "203.0.113.9"
        assert listener.address_of(x_envoy_external_address="6.6.6.6") == "127.0.0.1"
        assert listener.address_of(x_forwarded_for="10.1.2.3") == "10.1.2.3", "as clients of a private network are"
