"""Whether a secret belongs to a hash: asked once in a while, and remembered.

Only that is remembered. Whether the token is revoked or expired comes from the database each time, so nothing here
can outlive a revocation.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable

from extproc.auth.hashing import is_its_hash
from extproc.auth.token import Token
from extproc.memory.lane import Lane, LaneFull

__all__ = ["Verifier"]

_REMEMBERED_S = 300.0
"""Gates ask again every 30 s for each token that is in use."""
_MOST_REMEMBERED = 20_000
"""About 8 MB."""

_Question = tuple[bytes, str]
"""SHA-256 of the plaintext, and the hash. A hash that was replaced makes another question."""


class Verifier:
    """Belongs to one event loop."""

    def __init__(
        self,
        lane: Lane,
        clock: Callable[[], float] = time.monotonic,
        check: Callable[[str, str], bool] = is_its_hash,
    ) -> None:
        """`lane`: whose threads compute; it stays the caller's to close."""
        self._lane = lane
        self._clock = clock
        self._check = check
        self._known: OrderedDict[_Question, float] = OrderedDict()
        """Until when; the latest used last."""
        self._running: dict[str, tuple[_Question, asyncio.Task[bool]]] = {}
        """By prefix: one computation each, so that a flood of guesses at one token leaves the others their threads."""

    async def is_genuine(self, token: Token, plaintext: str) -> bool:
        """Raises LaneFull, and HashUnusable."""
        question = (hashlib.sha256(plaintext.encode()).digest(), token.hash)
        if self._is_known(question):
            return True
        running = self._running.get(token.prefix)
        if running is None:
            task = asyncio.create_task(self._ask(question, token.prefix, plaintext), name="verify token")
            task.add_done_callback(_seen)
            self._running[token.prefix] = question, task
        elif running[0] == question:
            task = running[1]
        else:
            raise LaneFull
        # A caller that goes away leaves it to the others, and to the next who asks.
        return await asyncio.shield(task)

    async def _ask(self, question: _Question, prefix: str, plaintext: str) -> bool:
        try:
            is_genuine = await self._lane.run(lambda: self._check(question[1], plaintext))
        finally:
            del self._running[prefix]
        if is_genuine:
            self._known[question] = self._clock() + _REMEMBERED_S
            if len(self._known) > _MOST_REMEMBERED:
                self._known.popitem(last=False)
        return is_genuine

    def _is_known(self, question: _Question) -> bool:
        until = self._known.get(question)
        if until is None:
            return False
        if self._clock() >= until:
            del self._known[question]
            return False
        self._known.move_to_end(question)
        return True


def _seen(task: asyncio.Task[bool]) -> None:
    # When all callers are gone nobody else looks at its failure, and asyncio would complain.
    if not task.cancelled():
        task.exception()
