"""Ends a process whose event loop stands still.

A frozen filter costs every request Envoy's `message_timeout`; a dead one costs nothing, since Envoy sees the closed
connection at once. So a process that cannot answer is better gone, and its supervisor starts it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time

__all__ = ["EXIT_STALLED", "Watchdog"]

EXIT_STALLED = 70
"""EX_SOFTWARE of sysexits.h."""

_CHECKS_PER_LIMIT = 2
"""Each wakes the process up. A stall is found after one limit at the earliest and one and a half at the latest."""


class Watchdog:
    """Ends the process with EXIT_STALLED when its loop has not ticked for `limit_s`. `start` it in that loop."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._interval_s = limit_s / _CHECKS_PER_LIMIT
        self._last_tick = time.monotonic()
        self._stopping = threading.Event()
        self._ticker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Zero seconds turn it off."""
        if self._limit_s <= 0:
            return
        self._last_tick = time.monotonic()
        self._ticker = asyncio.get_running_loop().create_task(self._tick(), name="watchdog")
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        self._stopping.set()
        if self._ticker is not None:
            self._ticker.cancel()

    async def _tick(self) -> None:
        while True:
            self._last_tick = time.monotonic()
            await asyncio.sleep(self._interval_s)

    def _watch(self) -> None:
        slept_from = time.monotonic()
        while not self._stopping.wait(self._interval_s):
            now = time.monotonic()
            was_frozen = now - slept_from > self._limit_s
            if was_frozen:
                # This thread stood still as well: the whole process (SIGSTOP, a suspended machine), not its loop alone.
                self._last_tick = now
            elif now - self._last_tick > self._limit_s:
                _end_process()
            slept_from = now


def _end_process() -> None:
    """With a last word where somebody reads it; a full or closed pipe must not keep the process alive."""
    with contextlib.suppress(BaseException):
        os.set_blocking(2, False)
        os.write(2, b'{"level":"error","event":"event loop stood still, ending the process"}\n')
    os._exit(EXIT_STALLED)
