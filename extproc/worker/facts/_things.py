"""What is said of things of the user's: my birthday, our deadline, my sister's name. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from extproc.memory.model import Category
from extproc.worker.clauses import RELATIONS
from extproc.worker.facts._person import called, name_of
from extproc.worker.facts._telling import Build, Fact, Said, row, third_person, value_of
from extproc.worker.facts._words import DAY_NAME, NUMBER_WORDS, V
from extproc.worker.slots import slot

__all__ = ["OF_THINGS"]

_UNINFORMATIVE: Final = frozenset(
    """question problem issue point guess code computer laptop internet connection idea understanding answer
    request concern goal aim task query bad mistake fault apologies thinking assumption hope dream turn favorite
    favourite program script function app server test build error message input output file text essay prompt life
    day table database dataset repo repository branch cluster""".split()  # noqa: SIM905 (a table of words)
)
_INFORMATIVE = re.compile(
    rf"\d|\b(?:{NUMBER_WORDS})\b|(?<!^)\b[A-Z][a-z]|^[A-Z]|\b(?:tomorrow|monday|tuesday|wednesday|thursday|friday)\b"
)
_NAMES_A_DAY = re.compile(rf"\b(?i:{DAY_NAME})\b", re.IGNORECASE)
_VERBAL = re.compile(
    r"(?:not|being|going|getting|working|broken|about|that|to|how|why|very|so|too|also|still|here|there|all)\b",
    re.IGNORECASE,
)
_SEEN_FROM_TODAY = re.compile(
    r"\b(?:today|tonight|tomorrow|yesterday|soon|next|this|last|weekend|in \w+ (?:day|week|month)s?|\w+ days? ago|"
    r"(?:mon|tues|wednes|thurs|fri|satur|sun)day)\b",
    re.IGNORECASE,
)
"""What a birthday is only once: a week later it would be false. The episode has the day beside it."""
_ABOUT_SOMEBODY = re.compile(r"(?:from|in|at|on|allergic|called|named|now|born)\b")
"""What a predicate says of a person, and better."""


def _named_thing(match: re.Match[str], said: Said) -> Iterator[Fact]:
    value = name_of(match["v"])
    if not value and re.match(r"[A-Z]", match["v"]):
        value, _ = value_of(match)
    if value:
        thing = f"user's {match['thing'].strip().lower()}"
        yield replace(said.fact("name", value, f"The {thing} is called {value}"), subject=thing)


def _of_relation(match: re.Match[str], said: Said) -> Iterator[Fact]:
    """`My manager is Dana Ruiz`."""
    value, _ = value_of(match)
    name = name_of(value)
    if name == value and name[:1].isupper() and not re.search(r"(?:ish|ese|ian|can|German|French|Dutch)$", name):
        relation = match["relation"].lower()
        yield said.fact(slot(relation), name, f"The user's {relation} is {name}")


def _relation_birthday(match: re.Match[str], said: Said) -> Iterator[Fact]:
    """`My husband's birthday is 9 May`."""
    value, _ = value_of(match)
    if _SEEN_FROM_TODAY.search(value):
        return
    who = f"user's {match['relation'].lower()}"
    yield replace(said.fact("birthday", value, f"The {who}'s birthday is {value}"), subject=who)


def _my(kind: str) -> Build:
    def build(match: re.Match[str], said: Said) -> Iterator[Fact]:
        value, _ = value_of(match)
        if value and not _VERBAL.match(value) and not _SEEN_FROM_TODAY.search(value):
            statement = third_person(said.text[: match.start("v")] + value)
            yield said.fact(slot(kind), value, f"The user's {statement.split(' ', 1)[1]}")

    return build


def _favourite(match: re.Match[str], said: Said) -> Iterator[Fact]:
    value, _ = value_of(match)
    thing = match["thing"]
    if value and not _VERBAL.match(value) and not re.match(r"(?:thing|part|bit|way)\b", thing):
        statement = f"The user's favourite {thing} is {value}"
        yield said.fact(slot("favourite", thing), value, statement, Category.PREFERENCE)


def _deadline(match: re.Match[str], said: Said) -> Iterator[Fact]:
    value = re.sub(r"^not .* but ", "", match["v"].strip())
    if value.startswith("not "):
        return
    if not _INFORMATIVE.search(value) and not _NAMES_A_DAY.search(value):
        return
    thing = re.sub(r"^(?:the|my|our) ", "", match["thing"] or "")
    thing = thing or ("" if match["kind"].lower() == "deadline" else match["kind"])
    statement = f"The {match['kind'].lower()}{f' for the {thing}' if match['thing'] else ''} is {value}"
    yield said.fact(slot("deadline", thing), value, statement, corrects=match["moved"] is not None)


def _attribute(match: re.Match[str], said: Said) -> Iterator[Fact]:
    thing = match["thing"].lower()
    value, _ = value_of(match)
    words = thing.split()
    if re.fullmatch(RELATIONS, words[-1]) and _ABOUT_SOMEBODY.match(value):
        return
    if words[-1] in _UNINFORMATIVE or "'s" in thing or _VERBAL.match(value) or not _INFORMATIVE.search(value):
        return
    if re.fullmatch(r"(?:\w+ )?\w+ and .*", value):
        return
    if words[-1] == "birthday" and _SEEN_FROM_TODAY.search(value):
        return
    bare = thing.removeprefix("new ")
    statement = f"The user's {bare} {match['be'].lower()} {third_person(value)}"
    yield said.fact(slot("attribute", bare), third_person(value), statement, corrects=words[0] == "new")


OF_THINGS: Final = (
    row("my", rf"my (?:full |first |real |new )?name is (?:now |spelled |actually |spelt )?{V}", called),
    row(
        "my our",
        rf"(?:my|our) (?P<thing>{RELATIONS})(?:'s name)? is (?:called |named )(?P<v>[^,;()]{{1,60}})",
        _named_thing,
    ),
    row("my our", rf"(?:my|our) (?P<thing>{RELATIONS})'s name is (?P<v>[^,;()]{{1,60}})", _named_thing),
    row("my our", rf"(?:my|our) (?P<relation>{RELATIONS}) is (?P<v>[A-Z][^,;()]{{1,60}})$", _of_relation),
    row("my our", rf"(?:my|our) (?P<relation>{RELATIONS})'s birthday is (?:on )?{V}", _relation_birthday),
    row("my", rf"my birthday is (?:on )?(?:the )?{V}", _my("birthday")),
    row("my", rf"my time ?zone is {V}", _my("timezone")),
    row(
        "my our",
        rf"(?:my|our) (?:all[- ]time )?(?:favou?rite|preferred) (?P<thing>[\w -]{{2,30}}?) (?:is|are) {V}",
        _favourite,
    ),
    row(
        "the my our",
        r"(?:the|my|our) (?P<kind>deadline|due date|code freeze|release date|launch date|submission date)"
        r"(?: for (?P<thing>[\w -]{2,40}?))? (?:is (?:now )?|will be |(?P<moved>(?:has |is |was |got |had )"
        r"?(?:been )?(?:changed|moved|pushed|shifted|postponed|extended|brought forward)(?: back)? to ))"
        r"(?P<v>(?:on |by )?[^,;()]{2,60})",
        _deadline,
    ),
    row("my our", r"(?:my|our) (?P<thing>(?:[\w'-]+ ){0,2}[\w'-]+) (?P<be>is|are) (?P<v>[^,;()]{1,80})", _attribute),
)
