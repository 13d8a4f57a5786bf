"""What a passage found for headers that came before: a shortcut to the same finding, never to an older one. Pure.

A passage is a function of its events. So where headers, claims and the agent's verdict are those of an earlier request,
what was found up to the count is the same too. The caches say at each request what claims and verdict are, and
decide alone how long: an `Admitted` is only good together with the very claims that it was made from.

By a digest of the deciding headers, since they hold the token.
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2s

import msgspec

from extproc.gate.passage import Admitted

__all__ = ["Repeat", "Repeats", "repeat_key"]

_KEPT = 10_000
"""About 500 bytes each."""


def repeat_key(headers: bytes) -> bytes:
    """`headers`: as `glance.cut` returns them. BLAKE2s: hashlib's SHA-256 costs five times as much where the caches of
    the processor are cold, as they are behind a gRPC call."""
    return blake2s(headers).digest()


class Repeat(msgspec.Struct, frozen=True, gc=False):
    digest: bytes
    """Of the token, as the caches know it."""
    admitted: Admitted


class Repeats:
    """The least recently put make room: what is in use is put again soon after, for an agent's verdict is kept 2 s."""

    def __init__(self) -> None:
        self._kept: OrderedDict[bytes, Repeat] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: bytes) -> Repeat | None:
        return self._kept.get(key)

    def put(self, key: bytes, repeat: Repeat) -> None:
        self._kept[key] = repeat
        self._kept.move_to_end(key)
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
