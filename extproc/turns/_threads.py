"""Calls that block, in threads that no end of a process waits for: at its exit Python joins those of an executor."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["DaemonThreads"]

T = TypeVar("T")


class DaemonThreads:
    """At most so many at once; the others wait in line. A thread ends when nothing waits."""

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._running = 0

    async def run(self, call: Callable[[], T]) -> T:
        """Who gives up waiting leaves a call that has begun to end by itself, and takes others out of the line."""
        future: Future[T] = Future()
        with self._lock:
            self._waiting.append((future, call))
            needs_thread = self._running < self._most
            self._running += needs_thread
        if needs_thread:
            threading.Thread(target=self._work, name=self._name, daemon=True).start()
        return await asyncio.wrap_future(future)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._running -= 1
                    return
                future, call = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                _settle(future, call)


def _settle(future: Future[Any], call: Callable[[], Any]) -> None:
    try:
        result = call()
    except BaseException as error:  # noqa: BLE001 - it belongs to who waits
        future.set_exception(error)
    else:
        future.set_result(result)
