"""What somebody likes, prefers, and does again and again. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from extproc.memory.model import Category
from extproc.worker.facts._telling import (
    EMPTY_VALUE,
    Fact,
    Said,
    conjugated,
    listed,
    row,
    third_person,
    told,
    value_of,
    without_end,
)
from extproc.worker.facts._words import BE, DAY_NAME, HABIT, V

__all__ = ["ABSTENTIONS", "HABITS", "TASTES"]

_TASTE = r"(?:really |absolutely |also |just |still |truly |generally |usually |kind of )?"
_AVERSIONS: Final = frozenset({"hate", "dislike", "despise", "loathe", "detest", "cannot stand", "cannot bear"})


def _taste(match: re.Match[str], said: Said) -> Iterator[Fact]:
    is_aversion = match["verb"].lower().rstrip("s") in _AVERSIONS
    yield from listed("like", Category.PREFERENCE, flip=is_aversion)(match, said)


def _prefer(match: re.Match[str], said: Said) -> Iterator[Fact]:
    value, _ = value_of(match)
    parts = re.split(r" (?:over|to|rather than|instead of|than) ", value, maxsplit=1)
    if re.match(r"not\b", value) or (EMPTY_VALUE.match(parts[0]) and not parts[1:]):
        return
    statement = f"{said.who} {'prefers' if said.polarity > 0 else 'does not prefer'} {third_person(value)}"
    yield said.fact("prefer", third_person(parts[0]), statement, Category.PREFERENCE)


def _abstains(match: re.Match[str], said: Said) -> Iterator[Fact]:
    if not match["v"] or said.polarity > 0 or said.past:
        return
    value, end = value_of(match)
    is_eaten = match["verb"].lower().startswith("eat")
    full = value if is_eaten else f"{match['verb']} {value}".strip()
    yield said.fact(
        "diet" if is_eaten else "habit", third_person(full), told(said, end), Category.PREFERENCE, polarity=-1
    )


def _habit(match: re.Match[str], said: Said) -> Iterator[Fact]:
    if said.polarity < 0:
        return
    often = match["often"].lower()
    value = third_person(without_end(match["v"]).strip())
    does = value if said.clause.person == "other" else conjugated(value)
    polarity = -1 if often == "never" else 1
    yield said.fact("habit", value, f"{said.who} {often} {does}", Category.BEHAVIORAL, polarity=polarity)


def _regular(match: re.Match[str], said: Said) -> Iterator[Fact]:
    if re.search(r"every|each|(?:day|end)s\b", match["v"]):
        yield said.fact("habit", third_person(match["v"]).strip(), told(said), Category.BEHAVIORAL)


def _gave_up(match: re.Match[str], said: Said) -> Iterator[Fact]:
    value, _ = value_of(match)
    if said.polarity > 0 and not re.match(r"(?:working|here|trying)\b", value):
        statement = f"{said.who} has stopped {third_person(value)}"
        yield said.fact("habit", value, statement, Category.BEHAVIORAL, polarity=-1, corrects=True)


ABSTENTIONS: Final = (
    row(
        "drink drinks eat eats smoke smokes drive drives fly use",
        rf"(?P<verb>drinks?|eats?|smokes?|drives?|fly)(?: {V})?$",
        _abstains,
    ),
)
TASTES: Final = (
    row(
        "love loves like likes enjoy enjoys adore adores hate hates dislike dislikes despise despises loathe detest "
        "cannot really absolutely",
        rf"{_TASTE}(?P<verb>loves?|likes?|enjoys?|adores?|hates?|dislikes?|despises?|loathe|detest|cannot stand|"
        rf"cannot bear) {V}",
        _taste,
    ),
    row(
        "am is are",
        rf"{BE} (?:not )?(?:an? )?(?:really )?(?:big |huge |great )?(?:fan of|fond of|really into|into) {V}",
        listed("like", Category.PREFERENCE),
    ),
    row(
        "prefer prefers strongly would generally much",
        rf"(?:would )?(?:strongly |generally |much )?(?:prefers?|rather(?: have| use| get| see)?) {V}",
        _prefer,
    ),
)
HABITS: Final = (
    row(
        "always usually normally typically never only often",
        rf"(?P<often>always|usually|normally|typically|never|only|often) (?P<v>(?:{HABIT})s?\b[^;()]{{1,90}})",
        _habit,
    ),
    row(
        "go run swim cycle meet deploy train work release ship play goes runs plays works",
        rf"(?P<v>(?:{HABIT})(?:s|es)?\b[^;()]{{0,60}}\b(?:every|each|on) (?i:{DAY_NAME})s?\b[^;()]{{0,40}})",
        _regular,
    ),
    row(
        "have has stopped quit gave given",
        r"(?:have |has )?(?:stopped|quit|gave up|given up) "
        r"(?P<v>\w{3,15}ing\b[^,;()]{0,60}|coffee|alcohol|sugar|meat)",
        _gave_up,
    ),
)
