"""What a fact can be about, and which of these have one value at a time. Pure.

A slot is a kind, or a kind and its object: `home`, `favourite:colour`, `deadline:grant application`.
"""

from __future__ import annotations

from typing import Final

__all__ = ["WIDE_PLACES", "is_single_valued", "kind_of", "slot"]

_SINGLE: Final = frozenset(
    """name home employer role age birthday timezone language origin location email phone manager boss doctor landlord
    dentist therapist""".split()  # noqa: SIM905 (a table of words)
)
_SINGLE_OF_AN_OBJECT: Final = frozenset({"favourite", "deadline", "tool", "attribute"})
"""One value for each object: one favourite colour, one tool for deployment. Without an object they may have many."""
WIDE_PLACES: Final = frozenset(
    """africa, albania, alemania, algeria, allemagne, america, argentina, armenia, asia, australia, austria,
    bangladesh, belarus, belgium, bolivia, bosnia, brazil, bulgaria, canada, chile, china, colombia, croatia,
    cuba, cyprus, czech republic, czechia, denmark, deutschland, ecuador, egypt, england, espagne, españa,
    estonia, ethiopia, eu, europe, finland, france, francia, frankreich, georgia, germany, ghana, great britain,
    greece, holland, hungary, iceland, india, indonesia, iran, iraq, ireland, israel, italia, italie, italien,
    italy, japan, kenya, korea, latvia, lithuania, luxembourg, malaysia, malta, mexico, morocco, nepal,
    netherlands, new zealand, nigeria, northern ireland, norway, pakistan, peru, philippines, poland, portugal,
    qatar, romania, russia, saudi arabia, scandinavia, schweiz, scotland, serbia, slovakia, slovenia, south
    africa, south korea, spain, spanien, sri lanka, suisse, sweden, switzerland, taiwan, tanzania, thailand,
    tunisia, turkey, uae, uganda, uk, ukraine, united kingdom, united states, uruguay, us, usa, venezuela,
    vietnam, wales, österreich""".replace("\n   ", "").split(", ")
)
"""Countries and continents: beside a town in one, they say less and nothing else."""


def slot(kind: str, thing: str = "") -> str:
    words = " ".join(thing.casefold().split())
    return f"{kind}:{words}" if words else kind


def kind_of(name: str) -> str:
    return name.partition(":")[0]


def is_single_valued(name: str) -> bool:
    """Whether a new value ends the old one: only of these may a different value supersede."""
    kind, _, thing = name.partition(":")
    return kind in _SINGLE or (kind in _SINGLE_OF_AN_OBJECT and bool(thing))
