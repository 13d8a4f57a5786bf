"""Two engines on one PostgreSQL, while others write, and callers leave."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from grpc import StatusCode, aio
from ibex.context.v1 import context_pb2_grpc

from extproc.memory.model import Namespace
from extproc.memory.store import MemoryStore
from tests.integration.engine.conftest import (
    ANSWER_S,
    Engine,
    Make,
    await_ready,
    opened,
    postgres_with_vectors,
    question,
    starting_engine,
)
from tests.integration.turns import postgres_side
from tests.integration.turns.valkey_side import eventually

Pair = tuple[Engine, Engine]

QUESTION = "What is the name of my dog?"
CHANGES = 25
CALLS = 400
AT_ONCE = 100
IDLE_SHARE = 0.3
"""Of a core; an engine that still works takes a whole one, or as much of it as a busy machine gives."""


@pytest.fixture(scope="module")
def database(server: postgres_side.Server) -> Iterator[postgres_side.Database]:
    with postgres_with_vectors(server) as made:
        yield made


@pytest.fixture(scope="module")
def pair(database: postgres_side.Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with (
        starting_engine(database.url, tmp_path_factory.mktemp("one")) as one,
        starting_engine(database.url, tmp_path_factory.mktemp("other")) as other,
    ):
        await_ready(one)
        await_ready(other)
        yield one, other


@pytest.fixture(scope="module")
def store(database: postgres_side.Database) -> Iterator[MemoryStore]:
    with opened(database.url) as store:
        yield store


def test_what_one_process_adds_and_forgets_two_engines_see(
    pair: Pair, store: MemoryStore, agent: Namespace, make: Make
) -> None:
    for running in pair:
        assert running.ask(agent, QUESTION).assembled_context == ""
    store.add(memory := make("The user's dog is called Rex."))
    assert all(running.says(agent, QUESTION, "Rex") for running in pair)
    store.forget(agent, memory.id)
    assert all(running.says(agent, QUESTION, "Rex", is_there=False) for running in pair)


class Reader:
    """Asks one engine again and again."""

    def __init__(self, running: Engine, namespace: Namespace) -> None:
        self._running, self._namespace = running, namespace
        self.blocks: list[str] = []
        self.failures: list[Exception] = []
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._read, daemon=True)

    def _read(self) -> None:
        while not self.stopping.is_set():
            try:
                self.blocks.append(self._running.ask(self._namespace, QUESTION).assembled_context)
            except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
                self.failures.append(error)


@contextmanager
def reading(pair: Pair, namespace: Namespace) -> Iterator[list[Reader]]:
    readers = [Reader(running, namespace) for running in pair]
    for reader in readers:
        reader.thread.start()
    try:
        yield readers
    finally:
        for reader in readers:
            reader.stopping.set()
            reader.thread.join(ANSWER_S)


def test_a_namespace_that_changes_while_it_is_read_always_answers_and_forgets_for_good(
    pair: Pair, store: MemoryStore, agent: Namespace, make: Make
) -> None:
    store.add_many([make("The user's dog is called Rex."), *(make(f"A red bicycle of size {n}.") for n in range(100))])
    assert all(running.says(agent, QUESTION, "Rex") for running in pair)
    with reading(pair, agent) as readers:
        for number in range(CHANGES):
            store.add(passing := make(f"The user's other dog is called Passing{number}x."))
            store.add(make(f"A blue bicycle of size {number}."))
            if not number:
                for running in pair:
                    assert running.says(agent, QUESTION, "Passing0x")
            store.forget(agent, passing.id)
            time.sleep(0.02)
        for running in pair:
            assert running.says(agent, QUESTION, "Passing", is_there=False)
        counts = [len(reader.blocks) for reader in readers]
        eventually(lambda: all(len(reader.blocks) > count + 5 for reader, count in zip(readers, counts, strict=True)))
    for reader, count in zip(readers, counts, strict=True):
        assert not reader.failures
        assert all("Rex" in block for block in reader.blocks)
        assert any("Passing" in block for block in reader.blocks)
        assert not any("Passing" in block for block in reader.blocks[count + 1 :])


async def leave_early(stub: context_pb2_grpc.ContextAssemblyServiceAsyncStub, namespace: Namespace) -> str:
    """One call whose caller cancels it, or gives it too little time."""
    seconds = random.uniform(0, 0.02)
    is_cancelled = random.random() < 0.5
    call = stub.AssembleContext(question(namespace, QUESTION), timeout=ANSWER_S if is_cancelled else seconds)
    if is_cancelled:
        await asyncio.sleep(seconds)
        call.cancel()
    try:
        await call
    except asyncio.CancelledError:
        return StatusCode.CANCELLED.name
    except aio.AioRpcError as error:
        return error.code().name
    return StatusCode.OK.name


async def flood(listen: str, namespaces: list[Namespace]) -> Counter[str]:
    limit = asyncio.Semaphore(AT_ONCE)
    async with aio.insecure_channel(listen) as channel:
        stub: context_pb2_grpc.ContextAssemblyServiceAsyncStub = context_pb2_grpc.ContextAssemblyServiceStub(channel)

        async def one(namespace: Namespace) -> str:
            async with limit:
                return await leave_early(stub, namespace)

        return Counter(await asyncio.gather(*(one(random.choice(namespaces)) for _ in range(CALLS))))


def cpu_s(pid: int) -> float:
    """What a process has had, of user and system time."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_idle(pid: int) -> bool:
    before = cpu_s(pid)
    time.sleep(0.3)
    return cpu_s(pid) - before < 0.3 * IDLE_SHARE


def test_callers_that_leave_take_their_work_with_them(
    pair: Pair, store: MemoryStore, agent: Namespace, make: Make
) -> None:
    store.add_many([make(f"The user's dog number {n} has the name Rex{n}.") for n in range(300)])
    running, _ = pair
    assert running.says(agent, QUESTION, "Rex")
    lines = len(running.log())
    unknown = [Namespace(agent.org_id, str(uuid.uuid4())) for _ in range(20)]
    codes = asyncio.run(flood(running.listen, [agent, *unknown]))
    assert set(codes) <= {"OK", "CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
    assert min(codes["CANCELLED"], codes["DEADLINE_EXCEEDED"]) > 0
    eventually(lambda: running.metric("requests_inside") == 0)
    eventually(lambda: is_idle(running.process.pid))
    assert running.metric("requests_total", '{code="CANCELLED",method="AssembleContext"}') > 0
    assert running.log()[lines:] == []
    assert "Rex" in running.ask(agent, QUESTION).assembled_context
