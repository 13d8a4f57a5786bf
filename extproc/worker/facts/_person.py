"""Who somebody is: name, age, health, diet, languages, and what is theirs. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from extproc.worker.facts._telling import (
    Fact,
    Said,
    listed,
    plain,
    row,
    third_person,
    told,
    value_of,
    without_end,
)
from extproc.worker.facts._words import (
    BE,
    CONDITIONS,
    DIETS,
    ILLNESSES,
    LANGUAGES,
    NUMBER_WORDS,
    OWNED,
    V,
)

__all__ = ["HEALTH", "NAMES", "OWNS", "called", "name_of"]

_NOT_A_NAME: Final = frozenset(
    """back later when if now tomorrow tonight today at on a an the it me out here there missing not wrong sir maam
    crazy anytime again soon first whatever please private unknown
    done ready fine good great sorry new sure tired sick busy stuck lost happy glad curious""".split()  # noqa: SIM905 (a table of words)
)


def name_of(text: str) -> str:
    """The name at the start of the text: words with a capital, or one alone in lower case."""
    text = without_end(text).strip(" .!")
    if match := re.match(
        r"[A-ZÀ-Þ][\w'’.-]{0,30}(?: (?:(?:de|von|van|da|del|bin|al) )?[A-ZÀ-Þ][\w'’.-]{0,30}){0,3}", text
    ):
        return match[0] if match.end() == len(text) or text[match.end()] == " " else ""
    if re.fullmatch(r"[^\W\d_]{2,20}", text) and text.lower() not in _NOT_A_NAME:
        return text
    return ""


def called(match: re.Match[str], said: Said) -> Iterator[Fact]:
    value = name_of(match["v"])
    # `Call me Ishmael is how it begins`: words that are spoken of.
    if value and not re.match(r" (?:is|was|are)\b", match["v"][len(value) :]):
        yield said.fact("name", value, f"{said.who} is called {value}", polarity=1)


def _renamed(match: re.Match[str], said: Said) -> Iterator[Fact]:
    for fact in called(match, said):
        yield replace(fact, is_correction=True)


def _introduced(match: re.Match[str], said: Said) -> Iterator[Fact]:
    """`Hi, I'm Tom`: a name only after a greeting, as `I'm Dutch` looks the same."""
    is_people = re.search(r"(?:ish|ese|ch|ian|can|ist)$", match["v"])
    if said.clause.after_greeting and said.polarity > 0 and not is_people and match["v"].lower() not in _NOT_A_NAME:
        yield from called(match, said)


def _age(match: re.Match[str], said: Said) -> Iterator[Fact]:
    value = match["v"]
    if not value.isdigit() or 3 <= int(value) <= 119:
        yield said.fact("age", value, f"{said.who} is {value} years old")


def _allergic(match: re.Match[str], said: Said) -> Iterator[Fact]:
    if not re.match(r"(?:mondays|work|stupid)", match["v"], re.IGNORECASE):
        yield from listed("allergy")(match, said)


def _intolerant(match: re.Match[str], said: Said) -> Iterator[Fact]:
    for fact in plain("allergy")(match, said):
        yield replace(fact, statement=f"{fact.statement} intolerant")


def _diet(match: re.Match[str], said: Said) -> Iterator[Fact]:
    yield said.fact("diet", match["v"], told(said, match.end("v")))
    if food := match["intolerant"]:
        yield said.fact("allergy", food, f"{said.who} is {food} intolerant")


def _owns(match: re.Match[str], said: Said) -> Iterator[Fact]:
    value, end = value_of(match)
    polarity = said.polarity
    if match["none"]:
        polarity, value = -1, value.removeprefix("no ")
    if "called" in value or " named " in value:
        value = re.split(r" (?:called|named) ", value)[0]
    value = re.sub(r"^(?:an?|the) ", "", value)
    yield said.fact("owns", third_person(value), told(said, end), polarity=polarity)


NAMES: Final = (
    row("am is", rf"{BE} (?:called|named|known as) {V}", called),
    row("am", r"am (?P<v>[A-Z][a-zà-ÿ]{1,20})(?= from\b|$)", _introduced),
    row("go goes", rf"goe?s? by {V}", called),
    row("changed have has", rf"(?:have |has )?changed (?:my|her|his|their) name to {V}", _renamed),
    row("am is are", rf"{BE} (?P<v>\d{{1,3}}|{NUMBER_WORDS})(?: years? old)?$", _age),
    row(
        "turned",
        r"turned (?P<v>\d{1,3})"
        r"(?=$| (?:last|this|yesterday|today|recently|on|in|years?)\b|,| \w+ (?:day|week|month)s? ago)",
        _age,
    ),
)
HEALTH: Final = (
    row("am is are", rf"{BE} (?:very |severely |deadly |also )?allergic to {V}", _allergic),
    row("have has", r"(?:have|has) an? (?:severe |bad |mild )?(?P<v>[\w ]{2,30}) allergy", plain("allergy")),
    row(
        "am is are",
        rf"{BE} (?:an? )?(?:strict |lifelong )?(?P<v>(?i:{DIETS}))\b(?: and (?P<intolerant>\w+)[- ]intolerant)?",
        _diet,
    ),
    row("am is are", rf"{BE} (?P<v>\w{{3,20}})[- ]intolerant\b", _intolerant),
    row("am is are", rf"{BE} (?:also )?(?P<v>(?i:{CONDITIONS}))\b(?! (?:to|with)\b)", plain("health")),
    row("have has suffer suffers", rf"(?:have|has|suffers? from) (?:also )?(?P<v>(?i:{ILLNESSES}))\b", plain("health")),
    row(
        "speak speaks",
        rf"speaks? (?:fluent |some |a little |a bit of )?(?P<v>(?:(?i:{LANGUAGES}))\b[^,;.]{{0,60}})",
        listed("speaks"),
    ),
)
OWNS: Final = (
    row(
        "have has own owns got",
        rf"(?:(?:have|has)(?: got)?|own|owns|got) (?P<v>(?:(?P<none>no )|an? |one |(?:{NUMBER_WORDS}|\d{{1,2}}) )"
        rf"(?:[\w-]+ ){{0,2}}(?:(?i:{OWNED}))\b(?! (?:appointment|problem|question|accident))[^,;()]{{0,60}})",
        _owns,
    ),
    row(
        "have has own owns",
        r"(?:(?:have|has)(?: got)|own|owns) (?P<v>(?P<none>no )?an? [A-Z0-9][^,;()\n]{1,60})",
        _owns,
    ),
    row("have has", r"(?:have|has) (?P<none>)(?P<v>(?:an? )?(?:car|dog|cat))$", _owns),
)
