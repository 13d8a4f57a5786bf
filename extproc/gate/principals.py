"""Who a token is, and whether its agent may act: from the caches, else from the auth service, each question once.

The look-ups that need no waiting (`known_claims`, `known_agent`, `are_known`) are plain functions, because that is what
a busy gate does nearly always.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from extproc.gate import metrics
from extproc.gate.agent_cache import AgentCache, AgentKey
from extproc.gate.auth_client import AuthClient, Caller
from extproc.gate.guard import Admission, Budgets, Guard
from extproc.gate.token_cache import CLOCK_SKEW_S, TokenCache
from extproc.gate.verdict import AgentVerdict, Claims, TokenVerdict

__all__ = ["Principals", "digest_of"]

_WAIT_S = 0.1
"""For a place among the questions on their way. After a restart all tokens are asked for at once; Envoy waits longer
than this and two calls."""
_WAITING = 256
_AGENT_BURST, _AGENT_PER_S, _KEPT_TOKENS = 50, 10.0, 10_000
"""Agents that one token may name without being allowed to use them. Such requests are not counted by the limiter."""

T = TypeVar("T")


def digest_of(token: str) -> bytes:
    """SHA-256: what caches know a token by."""
    return hashlib.sha256(token.encode()).digest()


class Principals:
    def __init__(
        self,
        auth: AuthClient,
        cache: TokenCache,
        agents: AgentCache,
        guard: Guard,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._auth = auth
        self._cache = cache
        self._agents = agents
        self._guard = guard
        self._agent_budgets: Budgets[bytes] = Budgets(_AGENT_BURST, _AGENT_PER_S, _KEPT_TOKENS)
        self._clock = clock
        self._wall_clock = wall_clock
        self._tokens_asked: dict[bytes, asyncio.Task[Claims | TokenVerdict]] = {}
        self._agents_asked: dict[AgentKey, asyncio.Task[AgentVerdict]] = {}
        self._waiting: deque[asyncio.Future[None]] = deque()

    def known_claims(self, digest: bytes) -> Claims | None:
        return self._cache.get(digest, self._clock(), self._wall_clock())

    def known_agent(self, digest: bytes, agent_id: str) -> AgentVerdict | None:
        return self._agents.get((digest, agent_id), self._clock())

    def are_known(self, digest: bytes, claims: Claims, agent_id: str) -> bool:
        """Whether the caches hold these very claims for the token, and the agent as active."""
        now = self._clock()
        if self._cache.get(digest, now, self._wall_clock()) is not claims:
            return False
        return self._agents.get((digest, agent_id), now) is AgentVerdict.ACTIVE

    async def ask_claims(self, token: str, digest: bytes, address: str, caller: Caller) -> Claims | TokenVerdict:
        """`address`: the client's, for the guard. Two requests with the same token share one question."""
        return await _once(self._tokens_asked, digest, lambda: self._admit_token(token, digest, address, caller))

    async def ask_agent(self, token: str, digest: bytes, org_id: str, agent_id: str, caller: Caller) -> AgentVerdict:
        key = (digest, agent_id)
        return await _once(self._agents_asked, key, lambda: self._validate_agent(token, key, org_id, caller))

    async def _admit_token(self, token: str, digest: bytes, address: str, caller: Caller) -> Claims | TokenVerdict:
        admission = self._guard.admit(digest, address, self._clock())
        until = self._clock() + _WAIT_S
        while admission is Admission.WAIT and await self._wait_for_place(until - self._clock()):
            admission = self._guard.admit(digest, address, self._clock())
            if admission in {Admission.WRONG, Admission.BUSY}:
                self._wake_one()  # the place is still free
        match admission:
            case Admission.ASK:
                return await self._validate_token(token, digest, address, caller)
            case Admission.WRONG:
                metrics.GUARD.labels(reason="wrong").inc()
                return TokenVerdict.INVALID
            case Admission.WAIT | Admission.BUSY:
                metrics.GUARD.labels(reason="busy").inc()
                return TokenVerdict.BUSY

    async def _validate_token(self, token: str, digest: bytes, address: str, caller: Caller) -> Claims | TokenVerdict:
        epoch = self._cache.epoch
        try:
            found = await self._auth.validate_token(token, caller)
            now, wall = self._clock(), self._wall_clock()
            if isinstance(found, Claims) and self._is_over(found, now, wall):
                found = TokenVerdict.INVALID
            if found is not TokenVerdict.UNAVAILABLE:
                self._guard.settle(digest, address, now, is_valid=isinstance(found, Claims))
            if isinstance(found, Claims):
                self._cache.put(digest, found, epoch, now, wall)
            return found
        finally:
            self._guard.abandon(digest)
            self._wake_one()

    def _is_over(self, claims: Claims, now: float, wall: float) -> bool:
        """Revoked while it was being validated, or expired for longer than clocks may differ."""
        is_expired = claims.expires_at is not None and wall >= claims.expires_at + CLOCK_SKEW_S
        return is_expired or self._cache.is_revoked(claims, now)

    async def _validate_agent(self, token: str, key: AgentKey, org_id: str, caller: Caller) -> AgentVerdict:
        digest, agent_id = key
        asked = self._clock()
        if not self._agent_budgets.has_left(digest, asked):
            metrics.GUARD.labels(reason="agents").inc()
            return AgentVerdict.BUSY
        verdict = await self._auth.validate_agent(token, org_id, agent_id, caller)
        self._agents.put(key, verdict, asked)
        if verdict is AgentVerdict.TOKEN_INVALID:
            self._cache.drop(digest)
        elif verdict is AgentVerdict.NOT_AUTHORIZED:
            self._agent_budgets.charge(digest, self._clock())
        return verdict

    async def _wait_for_place(self, limit_s: float) -> bool:
        """Whether a question on its way was answered within `limit_s` seconds."""
        if limit_s <= 0 or len(self._waiting) >= _WAITING:
            return False
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await asyncio.wait_for(turn, limit_s)
        except TimeoutError:
            return False
        return True

    def _wake_one(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return


async def _once(asked: dict[Any, asyncio.Task[T]], key: object, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """The answer to a question that may be on its way already. Its first asker may go away without it being lost."""
    task = asked.get(key)
    if task is None:
        task = asked[key] = asyncio.create_task(ask())
        task.add_done_callback(lambda done: _forget(asked, key, done))
    return await asyncio.shield(task)


def _forget(asked: dict[Any, asyncio.Task[T]], key: object, done: asyncio.Task[T]) -> None:
    asked.pop(key, None)
    if not done.cancelled():
        done.exception()  # whoever still waits gets it; nobody need
