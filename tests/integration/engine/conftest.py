"""`extproc engine` in a process of its own, on SQLite or on a real PostgreSQL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ibex.context.v1 import context_pb2 as pb
from ibex.context.v1 import context_pb2_grpc
from psycopg import sql

from extproc.memory.features import open_indexer
from extproc.memory.model import Memory, Namespace, new_memory
from extproc.memory.store import MemoryStore, open_store
from extproc.settings import StoreSettings, load
from extproc.stack.child import die_with_parent
from extproc.stack.envoy import Address, free_port
from tests.integration.turns import postgres_side
from tests.integration.turns.valkey_side import eventually

Make = Callable[..., Memory]

UP_S = 90.0
STOP_S = 60.0
ANSWER_S = 10.0
"""For one answer on a busy machine; its time is not the subject here."""


@dataclass(frozen=True)
class Engine:
    stub: context_pb2_grpc.ContextAssemblyServiceStub
    health: health_pb2_grpc.HealthStub
    listen: str
    admin: str
    process: subprocess.Popen[bytes]
    log_file: Path

    def ask(self, namespace: Namespace, query: str) -> pb.AssembleContextResponse:
        return self.stub.AssembleContext(question(namespace, query), timeout=ANSWER_S)

    def is_serving(self, service: str) -> bool:
        request = health_pb2.HealthCheckRequest(service=service)
        answer = self.health.Check(request, timeout=ANSWER_S, wait_for_ready=True)  # type: ignore[attr-defined]
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def ready(self) -> tuple[int, str]:
        """The status of `/ready`, and what it says about the store."""
        answer = httpx2.get(f"http://{self.admin}/ready", timeout=ANSWER_S)
        return answer.status_code, answer.json()["dependencies"]["memory_store"]

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log_file.read_text().splitlines() if line.startswith("{")]

    def ends_with(self) -> int:
        """Its exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_S)

    def says(self, namespace: Namespace, query: str, text: str, *, is_there: bool = True) -> bool:
        """Whether the text comes to be in the block, or goes, within 10 s: notifications take some milliseconds."""
        for _ in range(100):
            if (text in self.ask(namespace, query).assembled_context) == is_there:
                return True
            time.sleep(0.1)
        return False

    def metric(self, name: str, labels: str = "") -> float:
        for line in httpx2.get(f"http://{self.admin}/metrics", timeout=20).text.splitlines():
            if line.startswith(f"ibex_engine_{name}{labels} "):
                return float(line.rpartition(" ")[2])
        return 0.0


def question(namespace: Namespace, query: str) -> pb.AssembleContextRequest:
    return pb.AssembleContextRequest(
        org_id=namespace.org_id,
        agent_id=namespace.agent_id,
        user_id=namespace.user_id or "",
        session_id="s",
        model="m",
        query=query,
    )


@contextmanager
def engine(url: str, directory: Path, **settings: str) -> Iterator[Engine]:
    """One that is ready."""
    with starting_engine(url, directory, **settings) as started:
        await_ready(started)
        yield started


def await_ready(started: Engine) -> None:
    eventually(lambda: is_up(started, "ready"), UP_S)


@contextmanager
def starting_engine(url: str, directory: Path, **settings: str) -> Iterator[Engine]:
    listen, admin = Address("127.0.0.1", free_port()), Address("127.0.0.1", free_port())
    environment = {
        **os.environ,
        "IBEX_DATABASE_URL": url,
        "IBEX_RETRIEVAL_WALL_MS": "5000",  # the machine may be busy
        **settings,
    }
    command = [sys.executable, "-m", "extproc", "engine", "--listen", str(listen), "--admin", str(admin)]
    directory.mkdir(exist_ok=True)
    log_file = directory / "log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [*command, "--data", str(directory)],
            env=environment,
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call
        )
    try:
        with grpc.insecure_channel(str(listen)) as channel:
            stub, health = context_pb2_grpc.ContextAssemblyServiceStub(channel), health_pb2_grpc.HealthStub(channel)
            yield Engine(stub, health, str(listen), str(admin), process, log_file)
    finally:
        process.kill()
        process.wait(10)


def is_up(running: Engine, page: str) -> bool:
    """Whether a page of the admin listener is a 200."""
    assert running.process.poll() is None, running.log_file.read_text()
    try:
        return httpx2.get(f"http://{running.admin}/{page}", timeout=2).is_success
    except httpx2.TransportError:
        return False


@pytest.fixture(scope="session")
def server() -> Iterator[postgres_side.Server]:
    with postgres_side.server() as started:
        yield started


@pytest.fixture
def postgres(server: postgres_side.Server) -> Iterator[postgres_side.Database]:
    with postgres_with_vectors(server) as database:
        yield database


@contextmanager
def postgres_with_vectors(server: postgres_side.Server) -> Iterator[postgres_side.Database]:
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
def make(agent: Namespace) -> Make:
    """A memory, the agent's unless told otherwise."""

    def build(content: str, whose: Namespace = agent) -> Memory:
        return new_memory(whose, content, id=str(uuid.uuid4()), now=datetime.now(UTC))

    return build


@contextmanager
def opened(url: str) -> Iterator[MemoryStore]:
    store = open_store(load(StoreSettings, database_url=url), open_indexer())
    try:
        yield store
    finally:
        store.close()
