"""Directives that were known a moment ago, and agents that had none. Pure: times are given, nothing is asked.

An entry is fresh, and served without a question, for 60 s while changes are heard and for 2 s while they are not. After
that it is stale: served when nobody answers, for ten minutes by default, since an outage must not take an instruction
away that is at hand. Two rules against races:

- Whoever asks takes a `mark` first. What was asked before a change was heard is not kept after it.
- An agent that has changed is forgotten, not only stale: a text that was withdrawn is not served again.

`now` is a clock that never jumps, in seconds.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TypeAlias

from extproc.directives.directive import ActiveDirective, Change

__all__ = ["DirectiveCache", "Kept"]

_HEARD_S = 60.0
"""As long as the key in Redis lives: a message that was lost on its way is made up for after this."""
_DEAF_S = 2.0
"""While changes are not heard; as for an agent's status in the gate."""
_CHANGES = 10_000
"""Remembered changes: more than come while a question is on its way."""
_ENTRY_BYTES = 600
"""Of an entry beside its text: ids, objects, its place in the table."""

_Agent: TypeAlias = tuple[str, str]
"""Organisation and agent."""


@dataclass(frozen=True, slots=True)
class Kept:
    directive: ActiveDirective | None
    """None: the agent has none."""
    is_fresh: bool


class _Entry:
    __slots__ = ("bytes", "checked_at", "fresh", "mark", "stale")

    def __init__(self, directive: ActiveDirective | None, mark: int, checked_at: float) -> None:
        self.fresh, self.stale = Kept(directive, True), Kept(directive, False)
        self.mark = mark
        self.checked_at = checked_at
        self.bytes = _ENTRY_BYTES + (directive.size_bytes if directive else 0)


class DirectiveCache:
    """By organisation and agent; the least recently used make room."""

    def __init__(self, entries: int, most_bytes: int, stale_s: float) -> None:
        """`stale_s`: how old what is served at most gets, from when it was asked for; 0: only fresh entries are."""
        self._most = entries
        self._most_bytes = most_bytes
        self._stale_s = stale_s
        self._entries: OrderedDict[_Agent, _Entry] = OrderedDict()
        self._bytes = 0
        self._count = 0
        """Goes up with everything heard or missed; a mark is its value at one moment."""
        self._changed: OrderedDict[_Agent | str, int] = OrderedDict()
        """When an agent, or any of an organisation's, was heard to change."""
        self._floor = 0
        """What was asked before this may have changed, whoever's it is."""
        self._heard_from = 0
        """Since this mark every change was heard."""
        self._trusted_until = float("-inf")

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        return self._bytes

    @property
    def mark(self) -> int:
        """To be taken before anybody is asked, and given to `put`."""
        return self._count

    def is_trusted(self, now: float) -> bool:
        return now < self._trusted_until

    def trust(self, now: float, until: float) -> None:
        """Every change up to `now` was heard; without another word this is believed up to `until`."""
        if not self.is_trusted(now):
            self._count += 1
            self._heard_from = self._count
        self._trusted_until = until

    def distrust(self) -> None:
        """A change may have been missed."""
        self._trusted_until = float("-inf")

    def get(self, org_id: str, agent_id: str, now: float) -> Kept | None:
        """None: nothing is at hand."""
        agent = (org_id, agent_id)
        entry = self._entries.get(agent)
        if entry is None:
            return None
        age_s = now - entry.checked_at
        if age_s < self._fresh_s(entry, now) and not self._may_have_changed(org_id, entry.mark):
            self._entries.move_to_end(agent)
            return entry.fresh
        if age_s < self._stale_s:
            self._entries.move_to_end(agent)
            return entry.stale
        self._drop(agent)
        return None

    def put(self, org_id: str, agent_id: str, directive: ActiveDirective | None, mark: int, asked_at: float) -> bool:
        """`mark` and `asked_at`: as they were before anybody was asked.

        False: a change was heard meanwhile, so that what was answered may be what it was before; ask again.
        """
        agent = (org_id, agent_id)
        if self._may_have_changed(org_id, mark) or self._changed.get(agent, 0) > mark:
            return False
        self._drop(agent)
        entry = self._entries[agent] = _Entry(directive, mark, asked_at)
        self._bytes += entry.bytes
        while self._bytes > self._most_bytes or len(self._entries) > self._most:
            self._drop(next(iter(self._entries)))
        return True

    def change(self, change: Change) -> None:
        """An agent that changed is forgotten; where it may be any of an organisation's, theirs are stale."""
        self._count += 1
        key: _Agent | str = change.org_id
        if change.agent_id is not None:
            key = (change.org_id, change.agent_id)
            self._drop(key)
        self._changed[key] = self._count
        self._changed.move_to_end(key)
        if len(self._changed) > _CHANGES:
            # The one that is dropped may be of an agent that is being asked for right now.
            _, mark = self._changed.popitem(last=False)
            self._floor = max(self._floor, mark)

    def _fresh_s(self, entry: _Entry, now: float) -> float:
        is_heard = now < self._trusted_until and entry.mark >= self._heard_from
        return _HEARD_S if is_heard else _DEAF_S

    def _may_have_changed(self, org_id: str, mark: int) -> bool:
        return mark < self._floor or self._changed.get(org_id, 0) > mark

    def _drop(self, agent: _Agent) -> None:
        entry = self._entries.pop(agent, None)
        if entry is not None:
            self._bytes -= entry.bytes
