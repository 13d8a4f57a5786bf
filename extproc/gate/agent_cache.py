"""What was said about an agent, for the 2 s that a pause may take to be seen. Pure: times are given.

Verdicts of both kinds are kept, so that unknown agents, agents of other orgs and paused ones all take the same time,
asked once or often. They are kept apart, so that made-up agents push out no real one; and by token, since a service may
let one token of an org use an agent and not another.
"""

from __future__ import annotations

from collections import OrderedDict

from extproc.gate.verdict import AgentVerdict

__all__ = ["AgentCache", "AgentKey"]

AgentKey = tuple[bytes, str]
"""The token's SHA-256, and the agent's id."""

_KEPT = 10_000
_KEPT_VERDICTS = frozenset((AgentVerdict.ACTIVE, AgentVerdict.INACTIVE, AgentVerdict.NOT_AUTHORIZED))


class AgentCache:
    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._active: OrderedDict[AgentKey, float] = OrderedDict()
        self._refused: OrderedDict[AgentKey, tuple[AgentVerdict, float]] = OrderedDict()

    def get(self, key: AgentKey, now: float) -> AgentVerdict | None:
        if (until := self._active.get(key)) is not None and now < until:
            return AgentVerdict.ACTIVE
        refused = self._refused.get(key)
        return refused[0] if refused is not None and now < refused[1] else None

    def put(self, key: AgentKey, verdict: AgentVerdict, now: float) -> None:
        """`now`: when the question was asked; an answer is as old as that."""
        self._active.pop(key, None)
        self._refused.pop(key, None)
        if verdict is AgentVerdict.ACTIVE:
            self._active[key] = now + self._keep_s
            if len(self._active) > _KEPT:
                self._active.popitem(last=False)
        elif verdict in _KEPT_VERDICTS:
            self._refused[key] = (verdict, now + self._keep_s)
            if len(self._refused) > _KEPT:
                self._refused.popitem(last=False)
