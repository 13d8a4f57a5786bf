"""Threads for one kind of blocking work, with room for so many calls. A call more is refused at once, not queued.

Callers wait 50 ms at most, so a queue that is longer than that only makes work that nobody waits for any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

__all__ = ["Lane", "LaneFull"]

T = TypeVar("T")


class LaneFull(Exception):
    """As many calls as fit are running and waiting already."""


class Lane:
    """Belongs to one event loop."""

    def __init__(self, name: str, threads: int, room: int) -> None:
        """`room`: calls that run or wait at one time."""
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._room = room
        self._taken = 0

    async def run(self, work: Callable[[], T]) -> T:
        """`work`, in a thread. Raises LaneFull, and what `work` raises.

        A caller that goes away takes back work that has not begun. Its place is free when the thread is.
        """
        if self._taken >= self._room:
            raise LaneFull
        loop = asyncio.get_running_loop()
        running = self._threads.submit(work)
        self._taken += 1
        running.add_done_callback(lambda _done: _tell(loop, self._give_back))
        return await asyncio.wrap_future(running)

    def close(self) -> None:
        """Running work ends by itself; what waits is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _give_back(self) -> None:
        self._taken -= 1


def _tell(loop: asyncio.AbstractEventLoop, what: Callable[[], None]) -> None:
    # Work may end after its loop has: at the end of a process nobody counts any more.
    if not loop.is_closed():
        loop.call_soon_threadsafe(what)
