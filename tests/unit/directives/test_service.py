"""The service through a real server and channel, over a real store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeAlias
from uuid import uuid4

import grpc
import pytest
import structlog
from grpc import aio
from ibex.directive.v1 import directive_pb2 as pb
from ibex.directive.v1 import directive_pb2_grpc
from prometheus_client import CollectorRegistry
from typing_extensions import override

from extproc.chat import InjectionMode
from extproc.directives.announce import DirectiveAnnouncer, NotWritten
from extproc.directives.directive import encode
from extproc.directives.service import DirectiveService
from extproc.directives.store import DirectiveStore
from extproc.memory.database import Database
from tests.unit.directives.test_store import NOW, put

Stub: TypeAlias = "directive_pb2_grpc.DirectiveServiceAsyncStub"  # known to type checkers alone


class Announcer(DirectiveAnnouncer):
    """A Redis of one process: it keeps what is written, and fails when told to."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], bytes] = {}
        self.told: list[tuple[str, str, str | None]] = []
        self.on_fill: Callable[[], None] = lambda: None
        self.fails = False

    @override
    def fill(self, org_id: str, agent_id: str, value: bytes) -> bool:
        if self.fails:
            raise NotWritten("Redis (somewhere) did not take it: TimeoutError")
        self.on_fill()
        return self.values.setdefault((org_id, agent_id), value) is value

    @override
    def changed(self, org_id: str, agent_id: str, version_id: str | None) -> None:
        self.values.pop((org_id, agent_id), None)
        self.told.append((org_id, agent_id, version_id))

    @override
    def close(self) -> None:
        pass


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DirectiveStore]:
    database = Database(f"sqlite:///{tmp_path / 'memories.db'}")
    yield DirectiveStore(database)
    database.close()


@asynccontextmanager
async def running(store: DirectiveStore, announcer: DirectiveAnnouncer | None = None) -> AsyncIterator[Stub]:
    service = DirectiveService(store, announcer, CollectorRegistry())
    server = aio.server()
    service.add_to_server(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield directive_pb2_grpc.DirectiveServiceStub(channel)
    await server.stop(0)
    await service.stop()


async def eventually(is_so: Callable[[], bool]) -> None:
    for _ in range(500):
        if is_so():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not so within 5 s")


ORG, OTHER_ORG, AGENT = (str(uuid4()) for _ in range(3))
REQUEST = pb.GetActiveDirectiveRequest(org_id=ORG, agent_id=AGENT)


async def test_the_active_version_is_answered(store: DirectiveStore) -> None:
    made = put(store, ORG, AGENT, "Be brief.", InjectionMode.USER_PREPEND)
    async with running(store) as stub:
        assert await stub.GetActiveDirective(REQUEST) == pb.GetActiveDirectiveResponse(
            found=True, content="Be brief.", injection_mode="user_prepend", version_id=made.version_id
        )
        upper = pb.GetActiveDirectiveRequest(org_id=ORG.upper(), agent_id=AGENT.upper())
        assert (await stub.GetActiveDirective(upper)).found


async def test_none_one_that_is_off_and_another_organisations_are_not_found(store: DirectiveStore) -> None:
    async with running(store) as stub:
        assert await stub.GetActiveDirective(REQUEST) == pb.GetActiveDirectiveResponse(found=False)
        put(store, ORG, AGENT, "Be brief.")
        other = pb.GetActiveDirectiveRequest(org_id=OTHER_ORG, agent_id=AGENT)
        assert await stub.GetActiveDirective(other) == pb.GetActiveDirectiveResponse(found=False)
        store.switch(ORG, AGENT, NOW, on=False)
        assert await stub.GetActiveDirective(REQUEST) == pb.GetActiveDirectiveResponse(found=False)


@pytest.mark.parametrize(
    "ids", [("", AGENT), (ORG, ""), ("x", AGENT), (ORG, "' OR 1=1"), (ORG.replace("-", ""), AGENT)]
)
async def test_ids_that_are_none_are_refused(store: DirectiveStore, ids: tuple[str, str]) -> None:
    async with running(store) as stub:
        with pytest.raises(aio.AioRpcError) as refused:
            await stub.GetActiveDirective(pb.GetActiveDirectiveRequest(org_id=ids[0], agent_id=ids[1]))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_answer_fills_redis(store: DirectiveStore) -> None:
    announcer = Announcer()
    made = put(store, ORG, AGENT, "Be brief.")
    async with running(store, announcer) as stub:
        await stub.GetActiveDirective(REQUEST)
        await eventually(lambda: bool(announcer.values))
        assert announcer.values == {(ORG, AGENT): encode(made.version_id, "Be brief.", "system_first")}
    assert announcer.told == []


@pytest.mark.parametrize("switches_off", [True, False])
async def test_a_change_between_reading_and_filling_leaves_nothing_old(
    store: DirectiveStore, switches_off: bool
) -> None:
    """The change was committed, and the key removed, before the old value was written."""
    announcer = Announcer()
    put(store, ORG, AGENT, "Old.")

    def change() -> None:
        if switches_off:
            store.switch(ORG, AGENT, NOW, on=False)
        else:
            put(store, ORG, AGENT, "New.")

    announcer.on_fill = change
    async with running(store, announcer) as stub:
        await stub.GetActiveDirective(REQUEST)
        await eventually(lambda: bool(announcer.told))
        assert announcer.values == {}
        assert announcer.told[0][:2] == (ORG, AGENT)


async def test_a_redis_that_is_away_changes_no_answer_and_is_left_alone_for_a_while(store: DirectiveStore) -> None:
    announcer = Announcer()
    announcer.fails = True
    put(store, ORG, AGENT, "Be brief.")
    with structlog.testing.capture_logs() as logs:
        async with running(store, announcer) as stub:
            for _ in range(20):
                assert (await stub.GetActiveDirective(REQUEST)).found
    lines = [line for line in logs if line["event"] == "directive_not_cached"]
    assert 2 <= len(lines) < 10
    assert "brief" not in str(logs)


async def test_a_database_that_is_away_is_unavailable_without_its_words(tmp_path: Path) -> None:
    file = tmp_path / "memories.db"
    file.write_bytes(b"this is no database, and long enough to be looked at" * 100)
    database = Database(f"sqlite:///{file}")
    async with running(DirectiveStore(database)) as stub:
        with pytest.raises(aio.AioRpcError) as refused:
            await stub.GetActiveDirective(REQUEST)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert refused.value.details() == "the directives cannot be read now"
    database.close()
