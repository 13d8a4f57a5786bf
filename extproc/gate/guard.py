"""Keeps a flood of wrong tokens from the auth service, and leaves the way open for good ones. Pure: times are given.

What is known of a question before it is asked decides what it costs:
- a token that was wrong a moment ago is wrong: not asked again;
- a token that was right before (`proven`) is asked at once, whatever the flood: that is every regular client whose
  cache entry ran out;
- any other is asked from a share of what the auth service is to bear. There is one for addresses that a right token
  came from, one for those that sent few tokens which did not prove right, and one for all. So the addresses of a flood
  soon have but the last, and all others, after a restart too, get in beside it. No address takes more than its own
  budget;
- where shares are spent, a token that comes again is asked from another one, for the second, third, … time it comes,
  at its address. Clients try three times; a flood that sends each token twice has spent the share of second tries, and
  one that sends them more often has fewer of them.

A wrong answer is what costs, so good tokens use nothing up. Proven does not mean valid: the auth service is asked all
the same. What is left: a flood from tens of thousands of addresses, few tokens from each, looks like as many clients.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum, auto
from typing import Generic, TypeAlias, TypeVar

__all__ = ["Admission", "Budgets", "Guard", "group_of", "network_of"]

_WRONG_S = 5.0
"""How long a wrong token stays wrong. Tokens are random: nobody uses one before it is made."""
_KEPT_WRONG = 20_000
_KEPT_PROVEN = 50_000
"""32 bytes each, and their place: 5 MB."""
_IN_FLIGHT = 16
"""Unproven questions at once, for each gate. One that costs Argon2id takes 10 to 50 ms of a core: more would queue."""
_KEPT_ADDRESSES = 10_000
_ADDRESS_BURST, _ADDRESS_PER_S = 50, 10.0
_SHARE_BURST, _SHARE_PER_S = 100, 20.0
"""Of each share: some 70 wrong tokens a second in all, with returns. 1 to 2 ms of the auth service each, if nobody has
such a token, and 10 where only its secret is wrong."""
_RETURN_BURST, _RETURN_PER_S = 10, 2.0
_ADDRESS_RETURN_BURST, _ADDRESS_RETURN_PER_S = 4, 1.0
_RETURN_S = 0.3
"""Sooner it is no second try but the same one again. Official clients wait half a second at least."""
_MOST_TRIES = 8
"""Counted; from then on they are one."""
_KEPT_UNPROVEN = 20_000
"""A gate answers some 3,000 questions a second: six seconds of nothing else, and official clients try thrice in three.
About 300 bytes each."""
_SUSPICION_BURST, _SUSPICION_PER_S = 4, 1 / 60
"""Tries of tokens that did not prove right, after which an address is suspected: a client's three. Slow, so
that a thousand addresses that share a flood do not look new again and again."""
_NETWORK_TIMES = 8
"""As many addresses' worth for their network: a whole /48 costs little."""

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

    def charge(self, key: K, now: float, amount: float = 1) -> None:
        """May go below zero, by a burst at most. A negative amount gives back."""
        self._levels[key] = (max(-self._burst, self._level(key, now) - amount), now)
        self._levels.move_to_end(key)
        if len(self._levels) > self._most:
            self._levels.popitem(last=False)

    def _level(self, key: K, now: float) -> float:
        level, at = self._levels.get(key, (self._burst, now))
        return min(self._burst, level + (now - at) * self._per_s)


class _Share(Enum):
    """Who may ask from it."""

    TRUSTED = auto()
    """An address that a right token came from."""
    UNSUSPECTED = auto()
    ANY = auto()


_Tries: TypeAlias = int
"""The share of tokens that came so often."""


@dataclass(slots=True)
class _Attempt:
    """A token that nobody has proven yet."""

    group: str
    """Where it came from last."""
    tries: int
    suspicion: int
    """What that address was charged for it."""
    at: float
    """Of the last try that counts."""


class Guard:
    """Call `admit`; after ASK exactly one of `settle` or `abandon`."""

    def __init__(self) -> None:
        self._wrong: OrderedDict[bytes, float] = OrderedDict()
        self._proven: OrderedDict[bytes, None] = OrderedDict()
        self._trusted: OrderedDict[str, None] = OrderedDict()
        self._unproven: OrderedDict[bytes, _Attempt] = OrderedDict()
        self._addresses: Budgets[str] = Budgets(_ADDRESS_BURST, _ADDRESS_PER_S, _KEPT_ADDRESSES)
        self._shares: Budgets[_Share] = Budgets(_SHARE_BURST, _SHARE_PER_S, len(_Share))
        self._returns: Budgets[_Tries] = Budgets(_RETURN_BURST, _RETURN_PER_S, _MOST_TRIES)
        self._address_returns: Budgets[tuple[str, _Tries]] = Budgets(
            _ADDRESS_RETURN_BURST, _ADDRESS_RETURN_PER_S, _KEPT_ADDRESSES
        )
        self._suspicion: Budgets[str] = Budgets(_SUSPICION_BURST, _SUSPICION_PER_S, _KEPT_ADDRESSES)
        self._network_suspicion: Budgets[str] = Budgets(
            _SUSPICION_BURST * _NETWORK_TIMES, _SUSPICION_PER_S * _NETWORK_TIMES, _KEPT_ADDRESSES
        )
        self._asked: dict[bytes, _Share | _Tries] = {}
        """On their way, unproven; what a wrong answer is charged to."""

    def admit(self, digest: bytes, address: str, now: float) -> Admission:
        if (until := self._wrong.get(digest)) is not None:
            if now < until:
                return Admission.WRONG
            del self._wrong[digest]
        if digest in self._proven:
            self._proven.move_to_end(digest)
            return Admission.ASK
        group = group_of(address)
        share = self._share_of(self._count_try(digest, group, now), group, now)
        if share is None:
            return Admission.BUSY
        if len(self._asked) >= _IN_FLIGHT:
            return Admission.WAIT
        self._asked[digest] = share
        return Admission.ASK

    def _count_try(self, digest: bytes, group: str, now: float) -> _Tries:
        attempt = self._unproven.get(digest)
        if attempt is None:
            attempt = self._unproven[digest] = _Attempt(group, 1, 0, now)
            if len(self._unproven) > _KEPT_UNPROVEN:
                self._unproven.popitem(last=False)
        elif attempt.group != group:
            # Each address answers for what it sends: else one could show a flood's tokens first, and others never pay.
            attempt.group, attempt.suspicion = group, 0
        elif now - attempt.at < _RETURN_S:
            return attempt.tries
        if now - attempt.at >= _RETURN_S:
            attempt.tries, attempt.at = min(attempt.tries + 1, _MOST_TRIES), now
            self._unproven.move_to_end(digest)
        attempt.suspicion += 1
        self._suspect(group, now)
        return attempt.tries

    def _suspect(self, group: str, now: float, amount: float = 1) -> None:
        self._suspicion.charge(group, now, amount)
        self._network_suspicion.charge(network_of(group), now, amount)

    def _share_of(self, tries: _Tries, group: str, now: float) -> _Share | _Tries | None:
        """The first that has something left; None: none has."""
        if self._addresses.has_left(group, now):
            if group in self._trusted and self._shares.has_left(_Share.TRUSTED, now):
                return _Share.TRUSTED
            if self._is_unsuspected(group, now) and self._shares.has_left(_Share.UNSUSPECTED, now):
                return _Share.UNSUSPECTED
            if self._shares.has_left(_Share.ANY, now):
                return _Share.ANY
        if tries > 1 and self._address_returns.has_left((group, tries), now) and self._returns.has_left(tries, now):
            return tries
        return None

    def _is_unsuspected(self, group: str, now: float) -> bool:
        """This try is counted already."""
        return self._suspicion.has_left(group, now) and self._network_suspicion.has_left(network_of(group), now)

    def settle(self, digest: bytes, address: str, now: float, *, is_valid: bool) -> None:
        """The auth service answered."""
        group = group_of(address)
        share = self._asked.pop(digest, _Share.ANY)
        attempt = self._unproven.pop(digest, None)
        if is_valid:
            self._proven[digest] = None
            if len(self._proven) > _KEPT_PROVEN:
                self._proven.popitem(last=False)
            self._trust(group)
            if attempt is not None:
                self._suspect(attempt.group, now, -attempt.suspicion)
            return
        self._proven.pop(digest, None)
        self._wrong[digest] = now + _WRONG_S
        if len(self._wrong) > _KEPT_WRONG:
            self._wrong.popitem(last=False)
        if isinstance(share, _Share):
            self._addresses.charge(group, now)
            self._shares.charge(share, now)
        else:
            self._address_returns.charge((group, share), now)
            self._returns.charge(share, now)

    def _trust(self, group: str) -> None:
        self._trusted[group] = None
        self._trusted.move_to_end(group)
        if len(self._trusted) > _KEPT_ADDRESSES:
            self._trusted.popitem(last=False)

    def abandon(self, digest: bytes) -> None:
        """It did not."""
        self._asked.pop(digest, None)


def group_of(address: str) -> str:
    """IPv4: the address; IPv6: its /64, which is what one customer of a network has. Anything else as it is."""
    if ":" not in address:
        return address
    try:
        parsed = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    return str(parsed.ipv4_mapped) if parsed.ipv4_mapped else parsed.exploded[:19]


def network_of(group: str) -> str:
    """Of a group: IPv4: its /24; IPv6: its /48. Anything else as it is."""
    if ":" in group:
        return group.rpartition(":")[0]
    return group.rpartition(".")[0] or group
