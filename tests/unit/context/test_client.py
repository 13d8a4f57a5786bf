"""The filter's client, with a real gRPC server that holds its answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from grpc import aio
from ibex.context.v1 import context_pb2 as pb
from ibex.context.v1 import context_pb2_grpc
from prometheus_client import REGISTRY
from typing_extensions import override

from extproc.context.client import EngineAnswer, EngineClient, EngineFailure

LONG_S = 10.0


class HeldEngine(context_pb2_grpc.ContextAssemblyServiceServicer):
    """Answers when it may."""

    def __init__(self) -> None:
        self.asked = asyncio.Semaphore(0)
        self.may_answer = asyncio.Event()

    @override
    async def AssembleContext(self, request: pb.AssembleContextRequest, _context: object) -> pb.AssembleContextResponse:
        self.asked.release()
        await self.may_answer.wait()
        return pb.AssembleContextResponse(assembled_context=request.query)


@asynccontextmanager
async def held(most_of_org: int) -> AsyncIterator[tuple[HeldEngine, EngineClient]]:
    engine = HeldEngine()  # type: ignore[abstract]  # asked for nothing else
    server = aio.server()
    context_pb2_grpc.add_ContextAssemblyServiceServicer_to_server(engine, server)
    client = EngineClient(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", most_of_org)
    await server.start()
    try:
        yield engine, client
    finally:
        await client.close()
        await server.stop(None)


def held_back() -> float:
    counted = REGISTRY.get_sample_value("ibex_extproc_engine_calls_held_back_total")
    assert counted is not None
    return counted


async def ask(client: EngineClient, org_id: str) -> EngineAnswer | EngineFailure:
    return await client.assemble(pb.AssembleContextRequest(org_id=org_id, query="tea"), LONG_S, None)


async def test_the_call_that_is_one_too_many_of_its_org_is_refused_without_asking() -> None:
    async with held(2) as (engine, client):
        open_calls = [asyncio.create_task(ask(client, "a")) for _ in range(2)]
        for _ in open_calls:
            await asyncio.wait_for(engine.asked.acquire(), LONG_S)
        before = held_back()
        assert await ask(client, "a") is EngineFailure.UNAVAILABLE
        assert engine.asked.locked()
        assert held_back() == before + 1
        engine.may_answer.set()
        assert all(isinstance(answer, EngineAnswer) for answer in await asyncio.gather(*open_calls))


async def test_another_org_is_asked_for_all_the_same() -> None:
    async with held(1) as (engine, client):
        first = asyncio.create_task(ask(client, "a"))
        await asyncio.wait_for(engine.asked.acquire(), LONG_S)
        other = asyncio.create_task(ask(client, "b"))
        await asyncio.wait_for(engine.asked.acquire(), LONG_S)
        engine.may_answer.set()
        assert [type(answer) for answer in await asyncio.gather(first, other)] == [EngineAnswer] * 2


@pytest.mark.parametrize("how", ["answered", "failed", "cancelled"])
async def test_a_call_that_has_ended_makes_room(how: str) -> None:
    async with held(1) as (engine, client):
        if how == "failed":
            late = client.assemble(pb.AssembleContextRequest(org_id="a"), 0.01, None)
            assert await late is EngineFailure.TIMEOUT
        else:
            first = asyncio.create_task(ask(client, "a"))
            await asyncio.wait_for(engine.asked.acquire(), LONG_S)
            if how == "answered":
                engine.may_answer.set()
            else:
                first.cancel()
            await asyncio.wait({first})
        engine.may_answer.set()
        assert isinstance(await ask(client, "a"), EngineAnswer)
