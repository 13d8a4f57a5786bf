"""What a flood from one organisation does to another, what a write costs, and an LRU that is too small."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import replace

import grpc
import numpy as np
from grpc import aio
from ibex.context.v1 import context_pb2 as pb
from ibex.context.v1 import context_pb2_grpc

from bench.engine.corpus import questions, rows
from bench.engine.server import agent_of
from extproc.context.index import Index
from extproc.memory.features import Row, open_indexer
from extproc.memory.model import Namespace

__all__ = ["cycle", "flood", "write_cost"]

FLOOD_ORG = str(uuid.UUID(int=0xF100D))
ROUNDS = 3
"""Alone and under the flood in turn, so that what else the machine does falls on both."""


async def flood(port: str, size: int, count: int, width: int) -> dict[str, float]:
    """A quiet organisation, one question every 20 ms, alone and beside another with `width` requests always open."""
    async with (
        aio.insecure_channel(f"127.0.0.1:{port}") as quiet,
        aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)]) as loud,
    ):
        stub = context_pb2_grpc.ContextAssemblyServiceStub(quiet)
        other = context_pb2_grpc.ContextAssemblyServiceStub(loud)
        alone: list[float] = []
        beside: list[float] = []
        counts = {"answered": 0, "refused": 0}
        refused: list[str] = []
        for _ in range(ROUNDS):
            alone += await _ask(stub, agent_of(size), count, refused)
            stop = asyncio.Event()
            floods = [asyncio.create_task(_flood(other, size, stop, counts)) for _ in range(width)]
            beside += await _ask(stub, agent_of(size), count, refused)
            stop.set()
            await asyncio.gather(*floods)
    return {
        "alone_p50_ms": float(np.percentile(alone, 50)),
        "alone_p99_ms": float(np.percentile(alone, 99)),
        "beside_p50_ms": float(np.percentile(beside, 50)),
        "beside_p99_ms": float(np.percentile(beside, 99)),
        "refused": len(refused),
        "flood_answered": counts["answered"],
        "flood_refused": counts["refused"],
    }


async def cycle(port: str, size: int, namespaces: int, rounds: int) -> dict[str, float]:
    """So many namespaces of one size in turn. The LRU holds fewer; nothing may fail."""
    took, errors = [], 0
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = context_pb2_grpc.ContextAssemblyServiceStub(channel)
        for number in range(namespaces * rounds):
            start = time.perf_counter()
            try:
                await stub.AssembleContext(_request(agent_of(size, number % namespaces), "my bicycle"), timeout=5)
            except grpc.RpcError:
                errors += 1
            took.append((time.perf_counter() - start) * 1000)
    return {"p50_ms": float(np.percentile(took, 50)), "p99_ms": float(np.percentile(took, 99)), "errors": errors}


def write_cost(size: int = 10_000, writes: int = 200) -> dict[str, float]:
    """CPU milliseconds of one more memory: its features, and its place in a live index."""
    indexer = open_indexer()
    namespace = agent_of(size)
    index = Index(namespace)
    index.load(rows(size, namespace, indexer))
    new = [row.memory for batch in rows(writes, namespace, indexer, seed=9) for row in batch]
    new = [replace(memory, session_id="written") for memory in new]
    start = time.thread_time()
    made = [indexer.features([memory], [new[max(0, at - 2) : at]])[0] for at, memory in enumerate(new)]
    middle = time.thread_time()
    index.remove("none")  # makes the dictionary of ids, once
    begun = time.thread_time()
    for row in map(Row, new, made):
        index.update([row])
    end = time.thread_time()
    return {"features_ms": 1000 * (middle - start) / writes, "index_ms": 1000 * (end - begun) / writes}


async def _ask(
    stub: context_pb2_grpc.ContextAssemblyServiceAsyncStub, namespace: Namespace, count: int, refused: list[str]
) -> list[float]:
    took = []
    for text in questions(count):
        start = time.perf_counter()
        try:
            await stub.AssembleContext(_request(namespace, text), timeout=10)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            refused.append(text)
        took.append((time.perf_counter() - start) * 1000)
        await asyncio.sleep(0.02)
    return took


async def _flood(
    stub: context_pb2_grpc.ContextAssemblyServiceAsyncStub, size: int, stop: asyncio.Event, counts: dict[str, int]
) -> None:
    asked = questions(100, seed=5)
    namespace = replace(agent_of(size), org_id=FLOOD_ORG)
    at = 0
    while not stop.is_set():
        at += 1
        try:
            await stub.AssembleContext(_request(namespace, asked[at % len(asked)]), timeout=10)
            counts["answered"] += 1
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            counts["refused"] += 1
            await asyncio.sleep(0.005)


def _request(namespace: Namespace, text: str) -> pb.AssembleContextRequest:
    return pb.AssembleContextRequest(
        org_id=namespace.org_id, agent_id=namespace.agent_id, session_id="bench", model="m", query=text
    )
