"""Work that can stop between its steps, so that others get the CPU and nobody works for who has left. Pure."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

__all__ = ["Steps", "advance", "finish"]

T = TypeVar("T")

Steps = Generator[None, bool | None, T]
"""Yields after each step, and is told there whether time is up: what can be left out is then left out."""


def advance(steps: Steps[T], is_late: bool | None) -> T | None:  # noqa: FBT001 (it is what `yield` gives)
    """One more step: the result, which is never None, or None before the last one. `is_late`: None for the first."""
    try:
        steps.send(is_late)
    except StopIteration as end:
        result: T = end.value
        return result
    return None


def finish(steps: Steps[T]) -> T:
    """All of it at once, with all the time in the world."""
    result = advance(steps, None)
    while result is None:
        result = advance(steps, False)
    return result
