"""Namespaces that are not in the process when they are asked for, on a real SQLite file and a real PostgreSQL."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

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

__all__ = ["STORES", "Cycle", "cold"]


@dataclass(frozen=True, slots=True)
class Cycle:
    """Namespaces in turn, of which the cache holds fewer: each has gone when its turn comes again."""

    size: int
    namespaces: int = 4
    room: float = 1.5


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
    server: Callable[[Sequence[str]], AbstractContextManager[Process]], store: str, cycle: Cycle, count: int
) -> dict[str, float]:
    """One question after the other, each to the next namespace, while those before are still being loaded."""
    with STORES[store]() as url:
        held_bytes = fill(url, cycle)
        with server(["--store", url, "--cache", str(int(cycle.room * held_bytes))]) as running:
            return ask(running, cycle, count)


def ask(running: Process, cycle: Cycle, count: int) -> dict[str, float]:
    took: list[float] = []
    resident: list[int] = []
    loaded = filled = errors = 0
    cpu_s = 0.0
    with grpc.insecure_channel(f"127.0.0.1:{running.port}") as channel:
        stub = context_pb2_grpc.ContextAssemblyServiceStub(channel)
        for number, text in enumerate(questions(count + cycle.namespaces)):
            if number == cycle.namespaces:  # statements are compiled, files are in the system's memory
                took.clear()
                loaded = filled = errors = 0
                cpu_s = running.cpu_s()
            whose = agent_of(cycle.size, number % cycle.namespaces)
            start = time.perf_counter()
            try:
                answer = stub.AssembleContext(asking(whose, text), timeout=10)
            except grpc.RpcError:
                errors += 1
            else:
                loaded += answer.metrics.cold_memory_retrieval_ms > 0
                filled += answer.memories_included > 0
            took.append((time.perf_counter() - start) * 1000)
            resident.append(running.resident_bytes())
        cpu_s = running.cpu_s() - cpu_s
    p50, p95, p99 = np.percentile(took, [50, 95, 99])
    return {
        "p50_ms": float(p50),
        "p95_ms": float(p95),
        "p99_ms": float(p99),
        "longest_ms": max(took),
        "cpu_ms": 1000 * cpu_s / count,
        "not_loaded": loaded / count,
        "with_memories": filled / count,
        "errors": errors,
        "resident_mb_at_first": resident[0] / 1e6,
        "resident_mb_half_way": resident[len(resident) // 2] / 1e6,
        "resident_mb_at_most": max(resident) / 1e6,
    }


def fill(url: str, cycle: Cycle) -> int:
    """Returns the bytes that one namespace takes in the cache."""
    indexer = open_indexer()
    known = _Known(indexer)
    store = open_store(load(StoreSettings, database_url=url), known)
    try:
        for number in range(cycle.namespaces):
            whose = agent_of(cycle.size, number)
            for batch in rows(cycle.size, whose, indexer, seed=number, batch=_AT_ONCE):
                store.add_many(known.take(batch))
        store.refresh_statistics(agent_of(cycle.size).org_id)  # as `extproc memory import` does
        return load_index(store, indexer, agent_of(cycle.size)).nbytes
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

    def without_vectors(self, memories: Sequence[Memory]) -> list[Features]:
        return [replace(self._features[one.id], vector=b"") for one in memories]
