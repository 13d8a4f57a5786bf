"""One Envoy with a gate, a scripted auth service and a real Valkey, shared by the tests that break nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import pytest

from extproc.stack.envoy import Address
from tests.integration.conftest import Gateway, StandIn, started
from tests.integration.gate.gate_side import GateProcess, ScriptedAuth, gate_process, with_limits
from tests.integration.turns import valkey_side
from tests.integration.turns.valkey_side import Server, eventually


@dataclass
class Door:
    """Everything about one gate. Each test makes orgs and agents of its own."""

    gateway: Gateway
    gate: GateProcess
    auth: ScriptedAuth
    redis: Server
    provider: StandIn

    def agent(self, org_id: str, status: str = "active") -> str:
        agent_id = str(uuid4())
        self.auth.agents[agent_id] = (org_id, status)
        return agent_id

    def caller(self, org_id: str | None = None, **token: Any) -> Caller:
        """A token of an org, a new one by default, and an agent of it."""
        org_id = org_id or str(uuid4())
        return Caller(self, org_id, self.auth.add(org_id, **token), self.agent(org_id))


@dataclass
class Caller:
    door: Door
    org_id: str
    token: str
    agent_id: str

    def chat(self, headers: dict[str, str] | None = None, **arguments: Any) -> httpx2.Response:
        own = {"authorization": f"Bearer {self.token}", "x-ibex-agent-id": self.agent_id}
        return self.door.gateway.chat(headers={**own, **(headers or {})}, **arguments)


Opener = Callable[..., Any]


@pytest.fixture(scope="session")
def open_door(
    envoy_binary: Path, provider_process: StandIn, processor_address: Address, processor_server: object
) -> Opener:
    @contextmanager
    def opened(
        directory: Path,
        *,
        timeout_s: float = 5.0,
        unhealthy_after: int = 100,
        collector: Address | None = None,
        **settings: str,
    ) -> Iterator[Door]:
        with ExitStack() as stack:
            redis = stack.enter_context(valkey_side.valkey(directory / "valkey", "--appendfsync", "no"))
            auth = ScriptedAuth()
            stack.callback(auth.stop)
            auth.start()
            gate = stack.enter_context(gate_process(directory / "gate", auth, redis.url, **settings))
            change, where = with_limits(timeout_s, unhealthy_after), provider_process.address
            filters = [processor_address]
            gateway = stack.enter_context(
                started(envoy_binary, "envoy.yaml", directory, filters, where, change, collector, gate.address)
            )
            del gateway.client.headers["authorization"]
            eventually(lambda: gate.metric("ibex_gate_revocation_channel_alive") == 1)
            yield Door(gateway, gate, auth, redis, provider_process)

    return opened


@pytest.fixture(scope="session")
def shared_door(open_door: Opener, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with open_door(tmp_path_factory.mktemp("door")) as door:
        yield door


@pytest.fixture
def door(shared_door: Door, provider: StandIn) -> Door:
    shared_door.auth.delay_s = 0.0
    shared_door.auth.behaviour = None
    return shared_door
