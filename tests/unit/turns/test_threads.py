from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from extproc.turns._threads import DaemonThreads


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "tested"]


async def test_it_gives_back_what_the_call_returns_or_raises() -> None:
    threads = DaemonThreads(1, "tested")
    assert await threads.run(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        await threads.run(lambda: 1 // 0)


async def test_no_more_run_at_once_than_said_and_all_get_their_turn() -> None:
    threads = DaemonThreads(2, "tested")
    go_on = threading.Event()

    def call() -> int:
        go_on.wait(10)
        return len(names())

    running = [asyncio.create_task(threads.run(call)) for _ in range(6)]
    await asyncio.sleep(0.05)
    assert len(names()) == 2
    go_on.set()
    assert max(await asyncio.gather(*running)) <= 2


async def test_a_thread_ends_when_nothing_waits() -> None:
    await DaemonThreads(1, "tested").run(int)
    for _ in range(500):
        if not names():
            break
        await asyncio.sleep(0.01)
    assert names() == []


async def test_who_gives_up_leaves_the_line() -> None:
    threads = DaemonThreads(1, "tested")
    go_on = threading.Event()
    called: list[str] = []
    first = asyncio.create_task(threads.run(lambda: go_on.wait(10)))
    second = asyncio.create_task(threads.run(lambda: called.append("second")))
    await asyncio.sleep(0.05)
    second.cancel()
    await asyncio.sleep(0)
    third = asyncio.create_task(threads.run(lambda: called.append("third")))
    go_on.set()
    await asyncio.gather(first, third)
    assert called == ["third"]


def test_a_call_that_never_ends_keeps_no_process_alive() -> None:
    program = """
import asyncio, threading
from extproc.turns._threads import DaemonThreads

async def main():
    running = asyncio.create_task(DaemonThreads(1, "stuck").run(threading.Event().wait))
    await asyncio.sleep(0.1)
    running.cancel()

asyncio.run(main())
print("ended", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")
