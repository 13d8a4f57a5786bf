"""The auth service through a real server and channel, over a real store, with two organisations in it."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest
import uuid_utils
from grpc import aio
from ibex.auth.v1 import auth_pb2 as pb
from ibex.auth.v1 import auth_pb2_grpc
from prometheus_client import CollectorRegistry

from extproc.auth.announce import Announcer
from extproc.auth.hashing import hash_token
from extproc.auth.new_token import new_token
from extproc.auth.service import AuthService
from extproc.auth.store import Agent, AgentStatus, IdentityStore, Organization
from extproc.auth.token import CHAT, Permission, Token
from extproc.memory.database import Database

__all__ = ["Client", "Clock", "Org", "refused", "running"]


class Clock:
    """The service's, which a test may turn."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC).replace(microsecond=0)

    def __call__(self) -> datetime:
        return self.now


@dataclass
class Org:
    """One organisation with an active agent, a token for chats and one that manages tokens."""

    store: IdentityStore
    clock: Clock

    def __post_init__(self) -> None:
        self.id, self.agent = str(uuid.uuid4()), str(uuid.uuid4())
        self.store.add_organization(Organization(self.id, "Acme", None, self.clock()))
        self.add_agent(self.agent)
        self.row, self.token = self.add_token()
        self.admin_row, self.admin = self.add_token(permissions=int(Permission.TOKEN_ADMIN))

    def add_agent(self, agent_id: str, status: AgentStatus = AgentStatus.ACTIVE) -> str:
        self.store.add_agent(Agent(self.id, agent_id, "Ada", status, self.clock(), self.clock()))
        return agent_id

    def add_token(self, **given: Any) -> tuple[Token, str]:
        fields = {"name": "n", "permissions": CHAT, "now": self.clock(), "hash_of": hash_token, **given}
        row, plaintext = new_token(id=str(uuid_utils.uuid7()), org_id=self.id, **fields)
        self.store.add_token(row)
        return row, plaintext


class Client:
    def __init__(self, channel: aio.Channel, database: Database, registry: CollectorRegistry, clock: Clock) -> None:
        self.stub = auth_pb2_grpc.AuthServiceStub(channel)
        self.store = IdentityStore(database)
        self.registry = registry
        self.clock = clock
        self.one, self.other = Org(self.store, clock), Org(self.store, clock)

    async def validate(self, token: str, *metadata: tuple[str, str]) -> pb.ValidateTokenResponse:
        return await self.stub.ValidateToken(pb.ValidateTokenRequest(access_token=token), metadata=metadata, timeout=10)

    async def validate_agent(self, org_id: str, agent_id: str, token: str) -> pb.ValidateAgentResponse:
        request = pb.ValidateAgentRequest(org_id=org_id, agent_id=agent_id)
        return await self.stub.ValidateAgent(request, metadata=bearer(token), timeout=10)

    async def create(self, token: str, **given: Any) -> pb.CreateTokenResponse:
        fields = {"org_id": self.one.id, "name": "n", "permissions": CHAT, **given}
        return await self.stub.CreateToken(pb.CreateTokenRequest(**fields), metadata=bearer(token), timeout=10)

    async def revoke(self, token: str, **given: Any) -> dict[str, str | bytes]:
        """The trailing metadata."""
        fields = {"org_id": self.one.id, "token_id": self.one.row.id, **given}
        call = self.stub.RevokeToken(pb.RevokeTokenRequest(**fields), metadata=bearer(token), timeout=10)
        await call
        return dict(await call.trailing_metadata())

    async def list(self, token: str, **given: Any) -> pb.ListTokensResponse:
        fields = {"org_id": self.one.id, **given}
        return await self.stub.ListTokens(pb.ListTokensRequest(**fields), metadata=bearer(token), timeout=10)

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"ibex_auth_{name}", labels) or 0.0


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),) if token else ()


@asynccontextmanager
async def running(database: Database, announcer: Announcer | None = None) -> AsyncIterator[Client]:
    registry, clock = CollectorRegistry(), Clock()
    service = AuthService(database, announcer, registry, clock)
    await service.start()
    server = aio.server()
    service.add_to_server(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Client(channel, database, registry, clock)
    finally:
        await server.stop(None)
        await service.stop()


async def refused(work: Any, code: grpc.StatusCode, words: str = "") -> str:
    """The message of a call that must fail with `code`."""
    with pytest.raises(aio.AioRpcError) as caught:
        await work
    assert caught.value.code() is code, caught.value.details()
    message = caught.value.details() or ""
    assert words in message
    return message
