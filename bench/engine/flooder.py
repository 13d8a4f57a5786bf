"""A client that always has so many requests open, in a process of its own, behind others for the CPU.

`python -m bench.engine.flooder PORT SIZE WIDTH MOST_OPEN`; ends at SIGTERM, and prints how many were answered and
refused. It asks with the filter's client, which lets so many through at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import replace

import uvloop

from bench.engine.corpus import questions
from bench.engine.pressure import FLOOD_ORG, asking
from bench.engine.server import agent_of
from extproc.context.client import EngineAnswer, EngineClient, EngineFailure

_NICE = 10
_PAUSE_S = 0.002
"""After a refusal: what a filter's own work on a request takes."""


async def run(port: str, size: int, width: int, most_open: int) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    counts = {"answered": 0, "refused": 0}
    client = EngineClient(f"127.0.0.1:{port}", most_open)
    print("open", flush=True)
    await asyncio.gather(*[_keep_one_open(client, size, stop, counts) for _ in range(width)])
    await client.close()
    print(counts["answered"], counts["refused"], flush=True)


async def _keep_one_open(client: EngineClient, size: int, stop: asyncio.Event, counts: dict[str, int]) -> None:
    asked = questions(100, seed=5)
    namespace = replace(agent_of(size), org_id=FLOOD_ORG)
    at = 0
    while not stop.is_set():
        at += 1
        answer = await client.assemble(asking(namespace, asked[at % len(asked)]), 0.045, None)
        if isinstance(answer, EngineAnswer):
            counts["answered"] += 1
        elif answer is EngineFailure.ERROR:
            raise AssertionError(answer)
        else:
            counts["refused"] += 1
            await asyncio.sleep(_PAUSE_S)


if __name__ == "__main__":
    os.nice(_NICE)
    uvloop.run(run(sys.argv[1], *map(int, sys.argv[2:5])))
