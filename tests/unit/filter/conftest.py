"""A filter with a real gRPC server and a real channel, and a stub engine behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest

from extproc.context.client import EngineClient
from extproc.filter.exchange import Policy
from extproc.filter.identity import IdentitySources
from extproc.filter.report import RequestLine
from extproc.filter.service import ContextProcessor
from tests.unit.filter.envoy_side import AGENT, Filter, StubEngine


@pytest.fixture
async def engine() -> StubEngine:
    return StubEngine()


@pytest.fixture
async def engine_address(engine: StubEngine) -> AsyncIterator[str]:
    server = grpc.aio.server()
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(engine.answer)
    service = "ibex.context.v1.ContextAssemblyService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"AssembleContext": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


@pytest.fixture
async def context_filter(engine_address: str) -> AsyncIterator[Filter]:
    """Patient: on a busy machine the engine's answer may take longer than an installation allows."""
    async with _filter(engine_address, budget_ms=10_000.0) as patient:
        yield patient


@pytest.fixture
async def hasty_filter(engine_address: str) -> AsyncIterator[Filter]:
    async with _filter(engine_address, budget_ms=45.0) as hasty:
        yield hasty


@asynccontextmanager
async def _filter(engine_address: str, budget_ms: float) -> AsyncIterator[Filter]:
    client = EngineClient(engine_address, most_of_org=24)
    identities = IdentitySources("metadata:ibex.identity/org_id", f"value:{AGENT}", "header:x-ibex-user-id")
    server = grpc.aio.server()
    lines: list[RequestLine] = []
    ContextProcessor(client, Policy(), identities, budget_ms, lines.append).add_to_server(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Filter(channel, lines)
    await server.stop(0)
    await client.close()
