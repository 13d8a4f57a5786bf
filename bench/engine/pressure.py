"""What a flood from one organisation does to another, what a write costs, and an LRU that is too small."""

from __future__ import annotations

import subprocess
import sys
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

__all__ = ["FLOOD_ORG", "asking", "cycle", "flood", "write_cost"]

FLOOD_ORG = str(uuid.UUID(int=0xF100D))
ROUNDS = 3
"""Alone and under the flood in turn, so that what else the machine does falls on both."""


def flood(port: str, size: int, count: int, width: int, most_open: int) -> dict[str, float]:
    """A quiet organisation, one question every 20 ms, alone and beside another with `width` requests always open.

    `most_open`: of them, what the flood's client lets through to the engine, as the filter's does. The flood comes from
    a process of its own: what it costs a client to flood is not the server's to answer for.
    """
    alone: list[float] = []
    beside: list[float] = []
    refused: list[str] = []
    answered_flood = refused_flood = 0
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = context_pb2_grpc.ContextAssemblyServiceStub(channel)
        for namespace in (agent_of(size), replace(agent_of(size), org_id=FLOOD_ORG)):
            for _ in range(100):  # until it is loaded
                if stub.AssembleContext(asking(namespace, "my red bicycle")).memories_included:
                    break
                time.sleep(0.1)
        _ask(stub, agent_of(size), count // 4, [])
        for _ in range(ROUNDS):
            alone += _ask(stub, agent_of(size), count, refused)
            command = [sys.executable, "-m", "bench.engine.flooder", port, *map(str, (size, width, most_open))]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as flooder:
                try:
                    assert flooder.stdout is not None
                    flooder.stdout.readline()
                    time.sleep(0.5)
                    beside += _ask(stub, agent_of(size), count, refused)
                    flooder.terminate()
                    counts = flooder.stdout.readline().split()
                finally:
                    flooder.kill()
            answered_flood += int(counts[0])
            refused_flood += int(counts[1])
    return {
        "alone_p50_ms": float(np.percentile(alone, 50)),
        "alone_p99_ms": float(np.percentile(alone, 99)),
        "beside_p50_ms": float(np.percentile(beside, 50)),
        "beside_p99_ms": float(np.percentile(beside, 99)),
        "refused": len(refused),
        "flood_answered": answered_flood,
        "flood_refused": refused_flood,
    }


async def cycle(port: str, size: int, namespaces: int, rounds: int) -> dict[str, float]:
    """So many namespaces of one size in turn. The LRU holds fewer; nothing may fail."""
    took, errors = [], 0
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = context_pb2_grpc.ContextAssemblyServiceStub(channel)
        for number in range(namespaces * rounds):
            start = time.perf_counter()
            try:
                await stub.AssembleContext(asking(agent_of(size, number % namespaces), "my bicycle"), timeout=5)
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


def _ask(
    stub: context_pb2_grpc.ContextAssemblyServiceStub, namespace: Namespace, count: int, refused: list[str]
) -> list[float]:
    took = []
    for text in questions(count):
        start = time.perf_counter()
        try:
            stub.AssembleContext(asking(namespace, text), timeout=10)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            refused.append(text)
        took.append((time.perf_counter() - start) * 1000)
        time.sleep(0.02)
    return took


def asking(namespace: Namespace, text: str) -> pb.AssembleContextRequest:
    return pb.AssembleContextRequest(
        org_id=namespace.org_id, agent_id=namespace.agent_id, session_id="bench", model="m", query=text
    )
