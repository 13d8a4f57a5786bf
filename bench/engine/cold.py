"""Namespaces that are not in the process when they are asked for, on a real SQLite file and a real PostgreSQL."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import grpc
import numpy as np
from ibex.context.v1 import context_pb2_grpc
from psycopg import sql

from bench.engine.corpus import questions, rows
from bench.engine.pressure import asking
from bench.engine.process import Process
from bench.engine.server import agent_of
from extproc.context.cache import load_index
from extproc.memory.features import Features, Row, WindowIndexer, open_indexer
from extproc.memory.model import Memory
from extproc.memory.store import open_store
from extproc.settings import StoreSettings, load
from tests.integration.turns import postgres_side

__all__ = ["STORES", "cold"]

NAMESPACES = 4
ROOM = 1.5
"""Namespaces that the cache holds: each has gone when its turn comes again."""
_AT_ONCE = 500


@contextmanager
def _sqlite() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="bench-cold-") as directory:
        yield f"sqlite:///{directory}/memories.db"


@contextmanager
def _postgres() -> Iterator[str]:
    with postgres_side.server() as server, postgres_side.database(server) as database:
        server.execute(sql.SQL("CREATE EXTENSION vector"), database=database.name)  # type: ignore[arg-type]
        yield database.url


STORES: dict[str, Callable[[], AbstractContextManager[str]]] = {"SQLite": _sqlite, "PostgreSQL": _postgres}


def cold(
    server: Callable[[Sequence[str]], AbstractContextManager[Process]], store: str, size: int, count: int
) -> dict[str, float]:
    """One question after the other, each to the next of NAMESPACES namespaces, most of which are being loaded then."""
    with STORES[store]() as url:
        held_bytes = _fill(url, size)
        with server(["--store", url, "--cache", str(int(ROOM * held_bytes))]) as running:
            return _asked(running, size, count)


def _asked(running: Process, size: int, count: int) -> dict[str, float]:
    took: list[float] = []
    loaded = filled = errors = 0
    cpu_s = 0.0
    with grpc.insecure_channel(f"127.0.0.1:{running.port}") as channel:
        stub = context_pb2_grpc.ContextAssemblyServiceStub(channel)
        for number, text in enumerate(questions(count + NAMESPACES)):
            if number == NAMESPACES:  # statements are compiled, files are in the system's memory
                took.clear()
                loaded = filled = errors = 0
                cpu_s = running.cpu_s()
            start = time.perf_counter()
            try:
                answer = stub.AssembleContext(asking(agent_of(size, number % NAMESPACES), text), timeout=10)
            except grpc.RpcError:
                errors += 1
            else:
                loaded += answer.metrics.cold_memory_retrieval_ms > 0
                filled += answer.memories_included > 0
            took.append((time.perf_counter() - start) * 1000)
        cpu_s = running.cpu_s() - cpu_s
    p50, p99 = np.percentile(took, [50, 99])
    return {
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "longest_ms": max(took),
        "cpu_ms": 1000 * cpu_s / count,
        "cold": loaded / count,
        "with_memories": filled / count,
        "errors": errors,
    }


def _fill(url: str, size: int) -> int:
    """Returns the bytes that one namespace takes in the cache."""
    indexer = open_indexer()
    known = _Known(indexer)
    store = open_store(load(StoreSettings, database_url=url), known)
    try:
        for number in range(NAMESPACES):
            whose = agent_of(size, number)
            for batch in rows(size, whose, indexer, seed=number, batch=_AT_ONCE):
                store.add_many(known.take(batch))
        return load_index(store, indexer, agent_of(size)).nbytes
    finally:
        store.close()


class _Known:
    """Writes the features that the corpus has made already."""

    def __init__(self, indexer: WindowIndexer) -> None:
        self.version = indexer.version
        self.dimension = indexer.dimension
        self._features: dict[str, Features] = {}

    def take(self, batch: Sequence[Row]) -> list[Memory]:
        self._features = {row.memory.id: row.features for row in batch}
        return [row.memory for row in batch]

    def features(self, memories: Sequence[Memory], _before: Sequence[Sequence[Memory]]) -> list[Features]:
        return [self._features[one.id] for one in memories]
