"""Who may work next, when more is asked than one process can do. Belongs to one event loop.

Requests in the house are bounded, of one organisation and of all; who finds it full is told so at once. Those inside
take turns for the CPU, one organisation after the other, so that a flood of one waits mostly for itself.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict, deque
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

__all__ = ["Admission", "Overloaded"]

LOOKS = 8
"""Rounds of the event loop before work begins that will hold it: each request needs some to get from the socket to its
queue, and nobody can take turns with what has not come in. About 0.1 ms."""
ORG_SHARE = 0.5
"""Of the house, at most, for one organisation."""


class Overloaded(Exception):
    """No room, or no turn in time. Trying again at once makes it worse."""


class Admission:
    def __init__(self, most_requests: int, most_running: int = 1) -> None:
        """`most_running`: that have the CPU at once; more than the process has of it only delay each other."""
        self._most = most_requests
        self._most_of_org = max(1, int(most_requests * ORG_SHARE))
        self._inside: Counter[str] = Counter()
        self._free = most_running
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """By organisation, the one whose turn is next first."""

    @property
    def inside(self) -> int:
        return self._inside.total()

    @contextmanager
    def room(self, org_id: str) -> Iterator[None]:
        """A place for one request. Raises Overloaded at once when there is none."""
        if self.inside >= self._most or self._inside[org_id] >= self._most_of_org:
            raise Overloaded
        self._inside[org_id] += 1
        try:
            yield
        finally:
            self._inside[org_id] -= 1
            if not self._inside[org_id]:
                del self._inside[org_id]

    @asynccontextmanager
    async def turn(self, org_id: str, deadline: float) -> AsyncIterator[None]:
        """The CPU, when it is this organisation's turn. Raises Overloaded at `deadline` (of `time.monotonic`)."""
        if self._free and not self._waiting:
            self._free -= 1
        else:
            await self._wait(org_id, deadline)
        try:
            for _ in range(LOOKS if self.inside > 1 else 0):
                await asyncio.sleep(0)
            yield
        finally:
            self._pass_on()

    async def _wait(self, org_id: str, deadline: float) -> None:
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(org_id, deque()).append(mine)
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await mine
        except BaseException as error:
            if mine.done() and not mine.cancelled():
                self._pass_on()  # the turn came together with the end
            else:
                self._leave(org_id, mine)
            if isinstance(error, TimeoutError):
                raise Overloaded from None
            raise

    def _leave(self, org_id: str, mine: asyncio.Future[None]) -> None:
        queue = self._waiting.get(org_id)
        if queue is not None and mine in queue:
            queue.remove(mine)
            if not queue:
                del self._waiting[org_id]

    def _pass_on(self) -> None:
        """To the first of the organisation that has waited longest for a turn."""
        while self._waiting:
            org_id, queue = self._waiting.popitem(last=False)
            next_ = queue.popleft()
            if queue:
                self._waiting[org_id] = queue
            if not next_.done():
                next_.set_result(None)
                return
        self._free += 1
