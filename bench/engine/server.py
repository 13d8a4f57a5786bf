"""The engine's service in a process of its own, on one CPU, over namespaces that are made when they are first read,
or over a database."""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from extproc.cli import GRPC_EXPERIMENTS

os.environ.setdefault("GRPC_EXPERIMENTS", GRPC_EXPERIMENTS)

import uvloop
from grpc import aio
from prometheus_client import CollectorRegistry

from bench.engine.corpus import rows
from extproc.context.service import ContextService
from extproc.memory.embedding import embedding_choice
from extproc.memory.features import Row, WindowIndexer, open_indexer
from extproc.memory.model import Namespace
from extproc.memory.store import Version, open_store
from extproc.settings import EngineSettings, load

__all__ = ["agent_of"]

ORG = str(uuid.UUID(int=0xBE11))
_CACHE_BYTES = 1 << 33
STREAMS = 40
"""Open at once on one connection: the rest of a flood waits in its own client."""


def agent_of(size: int, number: int = 0) -> Namespace:
    """The namespace of so many memories."""
    return Namespace(ORG, str(uuid.UUID(int=(size << 32) + number)))


class MadeStore:
    """What the service needs of a store: each agent has as many memories as its id says."""

    def __init__(self, indexer: WindowIndexer) -> None:
        self._indexer = indexer

    def version(self, *_: str) -> Version:
        return Version(1)

    @contextmanager
    def snapshot(self, partition: Namespace) -> Iterator[_Snapshot]:
        yield _Snapshot(partition, self._indexer)

    def candidates(self, *_: Any, **__: Any) -> list[Row]:
        return []

    def record_retrievals(self, *_: object) -> None: ...

    def check(self) -> None: ...

    def away_s(self) -> float:
        return 0.0


class _Snapshot:
    version = Version(1)

    def __init__(self, partition: Namespace, indexer: WindowIndexer) -> None:
        self._partition = partition
        self._indexer = indexer

    def active(self, **_: object) -> Iterator[list[Row]]:
        number = uuid.UUID(self._partition.agent_id).int
        return rows(number >> 32, self._partition, self._indexer, seed=number & 0xFFFFFFFF)

    def ids(self) -> set[str]:
        return set()

    def changed(self, *_: object) -> Sequence[Row]:
        return []


async def serve(cpu: int, warm: Sequence[int], cache_bytes: int, url: str) -> None:
    os.sched_setaffinity(0, {cpu})
    registry = CollectorRegistry()
    settings = load(EngineSettings, namespace_cache_bytes=cache_bytes, database_url=url)
    indexer = open_indexer(embedding_choice(settings))
    store = open_store(settings, indexer) if url else MadeStore(indexer)
    service = ContextService(store, indexer, settings, registry)  # type: ignore[arg-type]
    await service.start()
    for size in warm:
        before = _resident()
        await service.warm(agent_of(size), 3600)
        held = registry.get_sample_value("ibex_engine_cache_bytes")
        print(f"warm {size} {_resident() - before} {held:.0f}", flush=True)
    service.freeze()
    server = aio.server(options=[("grpc.so_reuseport", 0), ("grpc.max_concurrent_streams", STREAMS)])
    service.add_to_server(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"port {port}", flush=True)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    await stopping.wait()
    await server.stop(0.2)
    await service.stop()


def _resident() -> int:
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="bench.engine.server")
    parser.add_argument("--cpu", type=int, default=0)
    parser.add_argument("--cache", type=int, default=_CACHE_BYTES)
    parser.add_argument("--store", default="", help="URL of a database with the memories; empty: they are made")
    parser.add_argument("warm", nargs="*", type=int)
    options = parser.parse_args()
    uvloop.run(serve(options.cpu, options.warm, options.cache, options.store))
    sys.exit(0)
