"""What a fact can be about, and which of these have one value at a time. Pure.

A slot is a kind, or a kind and its object: `home`, `favourite:colour`, `deadline:grant application`.
"""

from __future__ import annotations

from typing import Final

__all__ = ["ABOUT_THINGS", "is_single_valued", "kind_of", "slot"]

_SINGLE: Final = frozenset(
    """name home employer role age birthday timezone language origin location email phone manager boss doctor landlord
    dentist therapist""".split()  # noqa: SIM905 (a table of words)
)
_SINGLE_OF_AN_OBJECT: Final = frozenset({"favourite", "deadline", "tool", "attribute"})
"""One value for each object: one favourite colour, one tool for deployment. Without an object they may have many."""
ABOUT_THINGS: Final = frozenset(
    {"like", "diet", "allergy", "tool", "habit", "owns", "speaks", "prefer", "rule", "health"}
)
"""What is so of many things at once, and of each thing it is so or it is not."""


def slot(kind: str, thing: str = "") -> str:
    words = " ".join(thing.casefold().split())
    return f"{kind}:{words}" if words else kind


def kind_of(name: str) -> str:
    return name.partition(":")[0]


def is_single_valued(name: str) -> bool:
    """Whether a new value ends the old one: only of these may a different value supersede."""
    kind, _, thing = name.partition(":")
    return kind in _SINGLE or (kind in _SINGLE_OF_AN_OBJECT and bool(thing))
