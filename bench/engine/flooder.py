"""A client that always has so many requests open, in a process of its own, behind others for the CPU.

`python -m bench.engine.flooder PORT SIZE WIDTH`; ends at SIGTERM, and prints how many were answered and refused.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import replace

import grpc
import uvloop
from grpc import aio
from ibex.context.v1 import context_pb2_grpc

from bench.engine.corpus import questions
from bench.engine.pressure import FLOOD_ORG, asking
from bench.engine.server import agent_of

_NICE = 10
_REFUSALS = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)


async def run(port: str, size: int, width: int) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    counts = {"answered": 0, "refused": 0}
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = context_pb2_grpc.ContextAssemblyServiceStub(channel)
        print("open", flush=True)
        await asyncio.gather(*[_keep_one_open(stub, size, stop, counts) for _ in range(width)])
    print(counts["answered"], counts["refused"], flush=True)


async def _keep_one_open(
    stub: context_pb2_grpc.ContextAssemblyServiceAsyncStub, size: int, stop: asyncio.Event, counts: dict[str, int]
) -> None:
    asked = questions(100, seed=5)
    namespace = replace(agent_of(size), org_id=FLOOD_ORG)
    at = 0
    while not stop.is_set():
        at += 1
        try:
            await stub.AssembleContext(asking(namespace, asked[at % len(asked)]), timeout=0.045)
            counts["answered"] += 1
        except grpc.RpcError as error:
            if error.code() not in _REFUSALS:
                raise
            counts["refused"] += 1


if __name__ == "__main__":
    os.nice(_NICE)
    uvloop.run(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
