"""Who may work next, when more is asked than one process can do. Belongs to one event loop.

Requests in the house are bounded, of one organisation and of all; who finds it full is told so at once. Those inside
share the CPU: one has the turn, in steps of a fraction of a millisecond, and after each step an organisation that has
had less of the CPU lately goes first. So a flood of one waits for itself, and another's request for one of its steps.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict, deque
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

__all__ = ["Admission", "Overloaded", "Turn"]

LOOKS = 8
"""Rounds of the event loop after each step: a request needs some to get from the socket to its queue, and nobody can go
first who has not come in. Each takes 10 µs when there is nothing."""
ORG_SHARE = 0.5
"""Of the house, at most, for one organisation."""
HALF_LIFE_S = 1.0
"""In which what an organisation has had of the CPU counts for half. Longer punishes for what is over, shorter forgets a
flood between two of its requests."""
LEAST_AHEAD_S = 0.005
"""Of CPU, that a running organisation must be ahead of a waiting one to make room: about one request. With less, two
equal floods would take turns at every step."""
_MOST_KNOWN = 4096
"""Organisations whose use is kept; the least are dropped, and count as new."""


class Overloaded(Exception):
    """No room, or no turn in time. Trying again at once makes it worse."""


class Admission:
    def __init__(self, most_requests: int) -> None:
        self._most = most_requests
        self._most_of_org = max(1, int(most_requests * ORG_SHARE))
        self._inside: Counter[str] = Counter()
        self._is_free = True
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """By organisation, the one that has waited longest for a turn first."""
        self._used_s: dict[str, float] = {}
        self._halved_at = time.monotonic()

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
    async def turn(self, org_id: str, deadline: float) -> AsyncIterator[Turn]:
        """The CPU, when it is this organisation's turn. Raises Overloaded at `deadline` (of `time.monotonic`)."""
        turn = Turn(self, org_id, deadline)
        await turn.take()
        try:
            yield turn
        finally:
            turn.leave()

    def use(self, org_id: str, seconds: float) -> None:
        """Count what an organisation has had of the CPU."""
        now = time.monotonic()
        if now - self._halved_at > HALF_LIFE_S:
            share = 0.5 ** ((now - self._halved_at) / HALF_LIFE_S)
            kept = sorted(self._used_s.items(), key=lambda one: -one[1])[:_MOST_KNOWN]
            self._used_s = {org: used * share for org, used in kept if used * share > LEAST_AHEAD_S / 10}
            self._halved_at = now
        self._used_s[org_id] = self._used_s.get(org_id, 0.0) + seconds

    def is_behind_others(self, org_id: str) -> bool:
        """Whether somebody waits who has had clearly less than this organisation."""
        limit = self._used_s.get(org_id, 0.0) - LEAST_AHEAD_S
        return any(self._used_s.get(other, 0.0) < limit for other in self._waiting)

    def take_free(self) -> bool:
        """The turn, when nobody has it and nobody waits."""
        is_mine = self._is_free and not self._waiting
        if is_mine:
            self._is_free = False
        return is_mine

    def pass_on(self) -> None:
        """The turn, to the organisation that has had least; of equals to the one that has waited longest."""
        while self._waiting:
            org_id = min(self._waiting, key=lambda org: self._used_s.get(org, 0.0))
            queue = self._waiting.pop(org_id)
            next_ = queue.popleft()
            if queue:
                self._waiting[org_id] = queue
            if not next_.done():
                next_.set_result(None)
                return
        self._is_free = True

    async def wait(self, org_id: str, deadline: float, *, is_begun: bool) -> None:
        """For the turn. `is_begun`: before those of the organisation that have not begun. Raises Overloaded."""
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue = self._waiting.setdefault(org_id, deque())
        if is_begun:
            queue.appendleft(mine)
            self.pass_on()
        else:
            queue.append(mine)
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await mine
        except BaseException as error:
            if mine.done() and not mine.cancelled():
                self.pass_on()  # the turn came together with the end
            else:
                self._forget(org_id, mine)
            if isinstance(error, TimeoutError):
                raise Overloaded from None
            raise

    def _forget(self, org_id: str, mine: asyncio.Future[None]) -> None:
        queue = self._waiting.get(org_id)
        if queue is not None and mine in queue:
            queue.remove(mine)
            if not queue:
                del self._waiting[org_id]


class Turn:
    """One request's right to the CPU, which it may have to give away between two steps."""

    def __init__(self, admission: Admission, org_id: str, deadline: float) -> None:
        self._admission = admission
        self._org_id = org_id
        self._deadline = deadline
        self._began = 0.0
        self._is_mine = False

    @property
    def is_late(self) -> bool:
        return time.monotonic() >= self._deadline

    async def take(self) -> None:
        """Raises Overloaded at the deadline."""
        if not self._admission.take_free():
            await self._admission.wait(self._org_id, self._deadline, is_begun=False)
        self._mine()

    async def step(self) -> None:
        """Between two steps: others come in, and may go first. Cancellation ends the work here.

        Raises Overloaded when the turn does not come back before the deadline.
        """
        self._charge()
        if self._admission.inside > 1:
            for _ in range(LOOKS):
                await asyncio.sleep(0)
        else:
            await asyncio.sleep(0)
        self._began = time.perf_counter()  # what went by meanwhile was others' work
        if self._admission.is_behind_others(self._org_id):
            self._is_mine = False
            await self._admission.wait(self._org_id, self._deadline, is_begun=True)
            self._mine()

    def leave(self) -> None:
        if self._is_mine:
            self._is_mine = False
            self._charge()
            self._admission.pass_on()

    def _mine(self) -> None:
        self._is_mine = True
        self._began = time.perf_counter()

    def _charge(self) -> None:
        now = time.perf_counter()
        self._admission.use(self._org_id, now - self._began)
        self._began = now
