"""Keeps a flood of wrong tokens from the auth service, and leaves the way open for good ones. Pure: times are given.

What is known of a question before it is asked decides what it costs:
- a token that was wrong a moment ago is wrong: not asked again;
- a token that was right before (`proven`) is asked at once, whatever the flood: that is every regular client whose
  cache entry ran out;
- any other is asked while wrong answers stay within two budgets, one for each client address and one for all, and
  while few such questions are on their way. A wrong answer is what costs, so good tokens use nothing up; a flood
  from some addresses leaves the others alone;
- where a budget is spent, a token that was turned away a moment ago and comes again is asked from a budget of its own:
  clients try again, and a flood that is worth the name never sends the same token twice.

Proven does not mean valid: the auth service is asked all the same.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from enum import Enum, auto
from typing import Generic, TypeVar

__all__ = ["Admission", "Budgets", "Guard", "group_of"]

_WRONG_S = 5.0
"""How long a wrong token stays wrong. Tokens are random: nobody uses one before it is made."""
_KEPT_WRONG = 20_000
_KEPT_PROVEN = 50_000
"""32 bytes each, and their place: 5 MB."""
_IN_FLIGHT = 16
"""Unproven questions at once, for each gate. Argon2id takes 20 to 50 ms of a core each: more would only queue."""
_ADDRESS_BURST, _ADDRESS_PER_S = 50, 10.0
_BURST, _PER_S = 200, 50.0
_KEPT_ADDRESSES = 10_000
_RETURN_BURST, _RETURN_PER_S = 20, 10.0
_RETURN_S = 0.3
"""Sooner it is no second try but the same one again. Official clients wait half a second at least."""
_KEPT_REFUSED = 20_000

K = TypeVar("K")


class Admission(Enum):
    ASK = auto()
    WRONG = auto()
    """It is known to be wrong."""
    WAIT = auto()
    """For one of the questions on their way to be answered; then `admit` again."""
    BUSY = auto()
    """Too many wrong ones: not asked now."""


class Budgets(Generic[K]):
    """A token bucket for each key. An absent key has a full one, so the least recently charged can be forgotten."""

    def __init__(self, burst: float, per_s: float, keys: int) -> None:
        self._burst = burst
        self._per_s = per_s
        self._most = keys
        self._levels: OrderedDict[K, tuple[float, float]] = OrderedDict()

    def has_left(self, key: K, now: float) -> bool:
        return self._level(key, now) >= 1

    def charge(self, key: K, now: float) -> None:
        """May go below zero, by as much as was on its way at once."""
        self._levels[key] = (self._level(key, now) - 1, now)
        self._levels.move_to_end(key)
        if len(self._levels) > self._most:
            self._levels.popitem(last=False)

    def _level(self, key: K, now: float) -> float:
        level, at = self._levels.get(key, (self._burst, now))
        return min(self._burst, level + (now - at) * self._per_s)


class Guard:
    """Call `admit`; after ASK exactly one of `settle` or `abandon`."""

    def __init__(self) -> None:
        self._wrong: OrderedDict[bytes, float] = OrderedDict()
        self._proven: OrderedDict[bytes, None] = OrderedDict()
        self._addresses: Budgets[str] = Budgets(_ADDRESS_BURST, _ADDRESS_PER_S, _KEPT_ADDRESSES)
        self._all: Budgets[None] = Budgets(_BURST, _PER_S, 1)
        self._returns: Budgets[None] = Budgets(_RETURN_BURST, _RETURN_PER_S, 1)
        self._refused: OrderedDict[bytes, float] = OrderedDict()
        """When each was turned away for the first time."""
        self._asked: dict[bytes, bool] = {}
        """On their way, unproven; whether they came again."""

    def admit(self, digest: bytes, address: str, now: float) -> Admission:
        if (until := self._wrong.get(digest)) is not None:
            if now < until:
                return Admission.WRONG
            del self._wrong[digest]
        if digest in self._proven:
            self._proven.move_to_end(digest)
            return Admission.ASK
        is_within = self._addresses.has_left(group_of(address), now) and self._all.has_left(None, now)
        if not is_within and not self._has_returned(digest, now):
            return Admission.BUSY
        if len(self._asked) >= _IN_FLIGHT:
            return Admission.WAIT
        self._asked[digest] = not is_within
        return Admission.ASK

    def _has_returned(self, digest: bytes, now: float) -> bool:
        first = self._refused.setdefault(digest, now)
        if len(self._refused) > _KEPT_REFUSED:
            self._refused.popitem(last=False)
        return now - first >= _RETURN_S and self._returns.has_left(None, now)

    def settle(self, digest: bytes, address: str, now: float, *, is_valid: bool) -> None:
        """The auth service answered."""
        has_returned = self._asked.pop(digest, False)
        self._refused.pop(digest, None)
        if is_valid:
            self._proven[digest] = None
            if len(self._proven) > _KEPT_PROVEN:
                self._proven.popitem(last=False)
            return
        self._proven.pop(digest, None)
        self._wrong[digest] = now + _WRONG_S
        if len(self._wrong) > _KEPT_WRONG:
            self._wrong.popitem(last=False)
        if has_returned:
            self._returns.charge(None, now)
            return
        self._addresses.charge(group_of(address), now)
        self._all.charge(None, now)

    def abandon(self, digest: bytes) -> None:
        """It did not."""
        self._asked.pop(digest, None)


def group_of(address: str) -> str:
    """IPv4: the address; IPv6: its /64, which is what one customer of a network has. Anything else as it is."""
    if ":" not in address:
        return address
    try:
        return str(ipaddress.IPv6Address(address.partition("%")[0]).exploded[:19])
    except ValueError:
        return address
