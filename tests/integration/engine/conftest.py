"""`extproc engine` in a process of its own, on SQLite or on a real PostgreSQL."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
import httpx2
import pytest
from ibex.context.v1 import context_pb2 as pb
from ibex.context.v1 import context_pb2_grpc
from psycopg import sql

from extproc.memory.features import open_indexer
from extproc.memory.model import Memory, Namespace, new_memory
from extproc.memory.store import MemoryStore, open_store
from extproc.settings import StoreSettings, load
from extproc.stack.envoy import Address, free_port
from tests.integration.turns import postgres_side

UP_S = 30.0
ANSWER_S = 10.0
"""For one answer on a busy machine; its time is not the subject here."""


@dataclass(frozen=True)
class Engine:
    stub: context_pb2_grpc.ContextAssemblyServiceStub
    admin: str

    def ask(self, namespace: Namespace, query: str) -> pb.AssembleContextResponse:
        request = pb.AssembleContextRequest(
            org_id=namespace.org_id, agent_id=namespace.agent_id, session_id="s", model="m", query=query
        )
        return self.stub.AssembleContext(request, timeout=ANSWER_S)

    def says(self, namespace: Namespace, query: str, text: str, *, is_there: bool = True) -> bool:
        """Whether the text comes to be in the block, or goes, within 10 s: notifications take some milliseconds."""
        for _ in range(100):
            if (text in self.ask(namespace, query).assembled_context) == is_there:
                return True
            time.sleep(0.1)
        return False

    def metric(self, name: str, labels: str = "") -> float:
        for line in httpx2.get(f"http://{self.admin}/metrics").text.splitlines():
            if line.startswith(f"ibex_engine_{name}{labels} "):
                return float(line.rpartition(" ")[2])
        return 0.0


@contextmanager
def engine(url: str, directory: Path, **settings: str) -> Iterator[Engine]:
    listen, admin = Address("127.0.0.1", free_port()), Address("127.0.0.1", free_port())
    environment = {
        **os.environ,
        "IBEX_DATABASE_URL": url,
        "IBEX_RETRIEVAL_WALL_MS": "5000",  # the machine may be busy
        **settings,
    }
    command = [sys.executable, "-m", "extproc", "engine", "--listen", str(listen), "--admin", str(admin)]
    with subprocess.Popen([*command, "--data", str(directory)], env=environment) as process:
        try:
            deadline = time.monotonic() + UP_S
            while not _is_up(str(admin)):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            with grpc.insecure_channel(str(listen)) as channel:
                yield Engine(context_pb2_grpc.ContextAssemblyServiceStub(channel), str(admin))
        finally:
            process.kill()
            process.wait(10)


def _is_up(admin: str) -> bool:
    try:
        return httpx2.get(f"http://{admin}/ready", timeout=1).is_success
    except httpx2.TransportError:
        return False


@pytest.fixture(scope="session")
def server() -> Iterator[postgres_side.Server]:
    with postgres_side.server() as started:
        yield started


@pytest.fixture
def postgres(server: postgres_side.Server) -> Iterator[postgres_side.Database]:
    server.start()
    with postgres_side.database(server) as database:
        server.execute(sql.SQL("CREATE EXTENSION vector"), database=database.name)  # type: ignore[arg-type]
        yield database


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/memories.db"
    database: postgres_side.Database = request.getfixturevalue("postgres")
    return database.url


@pytest.fixture
def agent() -> Namespace:
    return Namespace(str(uuid.uuid4()), str(uuid.uuid4()))


@pytest.fixture
def make(agent: Namespace) -> Callable[[str], Memory]:
    return lambda content: new_memory(agent, content, id=str(uuid.uuid4()), now=datetime.now(UTC))


@contextmanager
def opened(url: str) -> Iterator[MemoryStore]:
    store = open_store(load(StoreSettings, database_url=url), open_indexer())
    try:
        yield store
    finally:
        store.close()
