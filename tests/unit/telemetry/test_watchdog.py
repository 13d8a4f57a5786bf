"""In a process of its own: the watchdog ends the one that it watches."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

from extproc.telemetry.watchdog import EXIT_STALLED

PROGRAM = """
import asyncio, sys, time
from extproc.telemetry.watchdog import Watchdog
async def main():
    watchdog = Watchdog({limit_s})
    watchdog.start()
    print("started", flush=True)
    {body}
    watchdog.stop()
asyncio.run(main())
"""


def program(body: str, limit_s: float) -> list[str]:
    return [sys.executable, "-c", PROGRAM.format(body=body, limit_s=limit_s)]


def run(body: str, limit_s: float = 0.4) -> subprocess.Popen[str]:
    process = subprocess.Popen(program(body, limit_s), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process


def test_a_loop_that_stands_still_ends_the_process() -> None:
    with run("time.sleep(20)") as process:
        assert process.wait(10) == EXIT_STALLED
        assert process.stderr is not None
        assert "event loop stood still" in process.stderr.read()


def test_a_loop_that_ticks_is_left_alone() -> None:
    with run("await asyncio.sleep(2.5)", limit_s=1.0) as process:
        assert process.wait(20) == 0


def test_a_process_that_was_frozen_and_goes_on_is_left_alone() -> None:
    with run("await asyncio.sleep(2.5)", limit_s=1.0) as process:
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(2.0)
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(20) == 0


def test_a_reader_that_stopped_does_not_keep_a_stalled_process_alive() -> None:
    """Standard error is a pipe that is full, as when a container's log reader hangs."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 65536)
    os.set_blocking(writer, True)
    process = subprocess.Popen(program("time.sleep(20)", 0.4), stdout=writer, stderr=writer)
    try:
        assert process.wait(15) == EXIT_STALLED
    finally:
        process.kill()
        process.wait(10)
        os.close(reader)
        os.close(writer)
