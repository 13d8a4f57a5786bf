"""A gate with a real gRPC server and a real channel, and a stub auth service behind it. No Redis."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc.aio
import pytest

from extproc.gate.agent_cache import AgentCache
from extproc.gate.auth_client import AuthClient
from extproc.gate.guard import Guard
from extproc.gate.principals import Principals
from extproc.gate.report import DenialLine
from extproc.gate.service import Authorizer
from extproc.gate.token_cache import TokenCache
from tests.unit.gate.gate_side import Stub

PATIENCE_S = 20.0
"""For a question to the auth service; a hundred at once wait for each other, longer on a busy machine."""


@dataclass
class Gate:
    channel: grpc.aio.Channel
    cache: TokenCache
    stub: Stub
    auth: AuthClient
    lines: list[DenialLine] = field(default_factory=list)

    def trust(self) -> None:
        """As if the revocation channel were alive."""
        self.cache.trust(time.monotonic(), time.monotonic() + 60)


@pytest.fixture
async def stub() -> AsyncIterator[tuple[Stub, str]]:
    made = Stub()
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((made.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield made, f"127.0.0.1:{port}"
    await server.stop(0)


@pytest.fixture
async def gate(stub: tuple[Stub, str]) -> AsyncIterator[Gate]:
    behind, address = stub
    auth = AuthClient(address, PATIENCE_S)
    cache = TokenCache(100, 30)
    lines: list[DenialLine] = []
    authorizer = Authorizer(
        Principals(auth, cache, AgentCache(2), Guard()), None, denies_uncounted=False, write_line=lines.append
    )
    server = grpc.aio.server()
    authorizer.add_to_server(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Gate(channel, cache, behind, auth, lines)
    await server.stop(0)
    await auth.close()
