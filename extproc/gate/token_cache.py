"""Tokens that were valid a moment ago. Pure: times are given, nothing is asked.

The rule: claims are served only while it is certain that a revocation would have been heard. So each revocation message
removes its token and leaves a tombstone, against a validation that was asked before it and answered after it; and
whenever the channel was silent for too long the cache is emptied, and what was asked before that is not kept either.

`now` is a clock that never jumps, in seconds; `wall` is unix time.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from extproc.gate.verdict import Claims

__all__ = ["CLOCK_SKEW_S", "TokenCache"]

CLOCK_SKEW_S = 5.0
"""By so much the clocks of gate and auth service may differ. A token is not served from the cache in its last 5 s."""

_TOMBSTONE_S = 60.0
"""Longer than any validation, and than a replica of the auth service's database lags behind."""
_KEPT_TOMBSTONES = 10_000


@dataclass(frozen=True, slots=True)
class _Entry:
    claims: Claims
    until: float
    until_wall: float


class TokenCache:
    """By the token's SHA-256; the least recently used make room."""

    def __init__(self, entries: int, keep_s: float) -> None:
        """0 entries: nothing is kept."""
        self._most = entries
        self._keep_s = keep_s
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._digests: dict[str, bytes] = {}
        self._tombstones: OrderedDict[str, float] = OrderedDict()
        self._trusted_until = float("-inf")
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def epoch(self) -> int:
        """To be taken before a token is validated, and given to `put`."""
        return self._epoch

    def is_trusted(self, now: float) -> bool:
        return now < self._trusted_until

    def trust(self, now: float, until: float) -> None:
        """Every revocation up to `now` was heard; without another word this is believed up to `until`."""
        if not self.is_trusted(now):
            self.distrust()
        self._trusted_until = until

    def distrust(self) -> None:
        """A revocation may have been missed."""
        self._trusted_until = float("-inf")
        self._forget_all()

    def get(self, digest: bytes, now: float, wall: float) -> Claims | None:
        entry = self._entries.get(digest)
        if entry is None:
            return None
        if now >= self._trusted_until:
            self.distrust()
            return None
        if now >= entry.until or wall >= entry.until_wall:
            self.drop(digest)
            return None
        self._entries.move_to_end(digest)
        return entry.claims

    def put(self, digest: bytes, claims: Claims, epoch: int, now: float, wall: float) -> None:
        """Keeps nothing that could outlive its revocation or its expiry. `epoch`: as it was when the token was sent."""
        if epoch != self._epoch or not self.is_trusted(now) or not self._most:
            return
        if claims.token_id is None or self.is_revoked(claims, now):
            return
        until_wall = float("inf") if claims.expires_at is None else claims.expires_at - CLOCK_SKEW_S
        if wall >= until_wall:
            return
        self.drop(self._digests.get(claims.token_id, digest))
        self._entries[digest] = _Entry(claims, now + self._keep_s, until_wall)
        self._digests[claims.token_id] = digest
        while len(self._entries) > self._most:
            self.drop(next(iter(self._entries)))

    def drop(self, digest: bytes) -> None:
        entry = self._entries.pop(digest, None)
        if entry is not None and entry.claims.token_id is not None:
            self._digests.pop(entry.claims.token_id, None)

    def revoke(self, token_id: str, now: float) -> None:
        token_id = token_id.lower()
        if (digest := self._digests.get(token_id)) is not None:
            self.drop(digest)
        self._tombstones[token_id] = now + _TOMBSTONE_S
        self._tombstones.move_to_end(token_id)
        while self._tombstones and next(iter(self._tombstones.values())) <= now:
            self._tombstones.popitem(last=False)
        if len(self._tombstones) > _KEPT_TOMBSTONES:
            # The oldest may be of a token that is being validated right now.
            self._tombstones.popitem(last=False)
            self._epoch += 1

    def is_revoked(self, claims: Claims, now: float) -> bool:
        """Whether its revocation was heard within the last minute."""
        if claims.token_id is None:
            return False
        return self._tombstones.get(claims.token_id, float("-inf")) > now

    def _forget_all(self) -> None:
        self._entries.clear()
        self._digests.clear()
        self._epoch += 1
