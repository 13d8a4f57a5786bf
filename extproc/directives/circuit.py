"""Whether somebody who failed is worth another question. Pure: times are given."""

from __future__ import annotations

__all__ = ["Circuit"]

_TOLERATED = 2
"""Failures in a row before a pause: one may be a connection that was idle for too long."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 5.0


class Circuit:
    """After a few failures nobody asks for a while; after each further one for twice as long."""

    __slots__ = ("_failures", "_until")

    def __init__(self) -> None:
        self._failures = 0
        self._until = float("-inf")

    @property
    def is_failing(self) -> bool:
        """Whether the last few questions failed."""
        return self._failures >= _TOLERATED

    def is_open(self, now: float) -> bool:
        """Whether not to ask."""
        return now < self._until

    def succeeded(self) -> None:
        self._failures = 0
        self._until = float("-inf")

    def failed(self, now: float) -> None:
        if self.is_open(now):
            return  # a question that was asked before the pause
        self._failures += 1
        if self._failures >= _TOLERATED:
            pause_s = _FIRST_PAUSE_S * 2 ** min(self._failures - _TOLERATED, 10)
            self._until = now + min(_LONGEST_PAUSE_S, pause_s)
