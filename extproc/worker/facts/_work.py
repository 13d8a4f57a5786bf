"""What somebody does, where, and with which tools. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from extproc.memory.model import Category
from extproc.worker.facts._home import IS_SOFTWARE, since
from extproc.worker.facts._telling import Fact, Said, article, row, third_person, told, value_of, without_end
from extproc.worker.facts._words import BE, MONTH, NUMBER_WORDS, OCCUPATIONS, V
from extproc.worker.slots import slot

__all__ = ["SWITCHED", "TOOLS", "WORK"]

_NO_EMPLOYER = re.compile(
    r"(?:home|night|nights|it|this|that|my|myself|the (?:moment|bottom|same)|weekends?|two|a solution|"
    r"a living|free|fun|money|food|pleasure|peanuts|[\d])\b",
    re.IGNORECASE,
)
_SOMEBODY_WITH = re.compile(r" (?:an?|the|for|my|our|his|her|some|two|alone|behind|out)\b")
"""`Left Paris for Rome`, `joined Anna for lunch`, `left Maria a message`."""
_NO_TOOL = re.compile(
    rf"(?:it|this|that|them|these|the|a|an|my|our|your|one|both|all|some|only|\d|{NUMBER_WORDS})\b", re.IGNORECASE
)


def _employer(match: re.Match[str], said: Said) -> Iterator[Fact]:
    value, _, role = value_of(match)[0].partition(" as ")
    value = re.sub(rf"\s+(?:and|on|from|every|(?:in|since) (?:[a-z]|\d{{4}}|{MONTH}))\b.*", "", value)
    if not value or _NO_EMPLOYER.match(value):
        return
    groups = match.groupdict()
    if "capital" in groups and (not value[:1].isupper() or ("gone" not in groups and IS_SOFTWARE.search(value))):
        return
    if "capital" in groups and _SOMEBODY_WITH.search(value):
        return
    polarity = -1 if groups.get("gone") else said.polarity
    statement = told(said, match.start("v") + len(value)) + _when(match, said)
    yield said.fact("employer", value, statement, polarity=polarity, corrects=polarity < said.polarity)
    if role and said.polarity > 0:
        role = re.sub(r"^(?:an?|the) ", "", role)
        yield Fact(said.subject, "role", role, f"{said.who} works as {article(role)}", Category.FACTUAL)


def _when(match: re.Match[str], said: Said) -> str:
    when = since(match, said)
    return f" {when}" if when else ""


def _role(match: re.Match[str], said: Said) -> Iterator[Fact]:
    if match[0].lower().startswith("was"):
        return
    role = f"{match['kind'] or ''}{match['v']}".strip()
    yield said.fact("role", role, told(said, match.end("employer" if match["at"] == "of" else "v")))
    employer = match["employer"]
    if employer and said.polarity > 0 and match["at"] == "at":
        employer = re.sub(r"^the ", "", without_end(employer)).strip()
        if employer[:1].isupper():
            yield said.fact("employer", employer, f"{said.who} works at {employer}", polarity=1)


def _teaches(match: re.Match[str], said: Said) -> Iterator[Fact]:
    if said.polarity > 0 and re.match(r"teach(?:es)? [a-z]{4,}", match["v"]):
        yield Fact(said.subject, "role", match["v"], told(said), Category.FACTUAL, said.polarity)


def _tool(match: re.Match[str], said: Said) -> Iterator[Fact]:
    value, _, purpose = value_of(match)[0].partition(" for ")
    other = ""
    for divider in (" instead of ", " rather than ", " over "):
        value, _, replaced = value.partition(divider)
        purpose, _, replaced_late = purpose.partition(divider)
        other = other or replaced or replaced_late
    value = re.sub(r"\s+(?:to|in|at|on|as|with|and)\b.*", "", value).strip()
    if not value or len(value.split()) > 4 or _NO_TOOL.match(value):
        return
    thing = purpose.strip()
    if thing.lower() in {"everything", "it", "this", "that", "work"}:
        thing = ""
    yield from _tools(said, value, thing, other, corrects=bool(other))


def _tools(said: Said, value: str, thing: str, other: str, *, corrects: bool) -> Iterator[Fact]:
    """`other`: what the tool took the place of; empty: it is not said."""
    who = "The user's team" if said.clause.person == "we" else said.who
    purpose = f" for {third_person(thing)}" if thing else ""
    name = slot("tool", re.sub(r"^(?:our|my|the|all|their) ", "", thing))
    if other:
        yield said.fact(name, other, f"{who} no longer uses {other}{purpose}", polarity=-1, corrects=True)
    is_correction = said.is_correction or corrects
    verb = "uses" if said.polarity > 0 else "no longer uses" if is_correction else "does not use"
    yield said.fact(name, value, f"{who} {verb} {value}{purpose}", corrects=corrects)


def _switched(match: re.Match[str], said: Said) -> Iterator[Fact]:
    value, _, thing = value_of(match)[0].partition(" for ")
    value = re.sub(r"\s+(?:in|on|at|and)\b.*", "", value)
    if said.polarity < 0 or not value[:1].isupper():
        return
    # "We moved from Rome to Milan" is told in the same words.
    if match["verb"] == "moved" and not IS_SOFTWARE.search(f"{match['source']} {value} {thing}"):
        return
    when = _when(match, said)
    when = f" since {when.removeprefix(' in ').strip()}" if when.startswith(" in ") else when
    for fact in _tools(said, value, thing, match["source"] or "", corrects=True):
        yield replace(fact, statement=fact.statement + when) if fact.polarity > 0 else fact


SWITCHED: Final = (
    row(
        "moved switched migrated changed have has",
        rf"(?:have |has )?(?P<verb>switched|migrated|changed|moved) (?:from (?P<source>[\w .#+-]{{1,40}}?) )to {V}",
        _switched,
    ),
)
WORK: Final = (
    row("work works working am is are", rf"(?:(?:work|works)|{BE} working) (?:at|for) {V}", _employer),
    row(
        "started joined have has start",
        rf"(?:have |has )?(?:just |recently )?(?:started|joined)(?: work)?(?: working)?(?: at)? (?P<capital>){V}",
        _employer,
    ),
    row(
        "left quit resigned have has",
        r"(?:have |has )?(?:just |recently )?(?P<gone>left|quit|resigned)(?: my job)?(?: at| from)? "
        rf"(?P<capital>){V}",
        _employer,
    ),
    row(
        "work works am is are was were",
        rf"(?:(?:work|works|working) as|{BE}(?: working as)?) (?:an?|the) "
        rf"(?P<kind>(?:(?!bit|lot|little|fan|friend)[\w-]+ ){{0,3}})(?P<v>(?i:{OCCUPATIONS}))\b"
        r"(?! of (?:this|that|the (?:story|film)))"
        r"(?: (?P<at>at|for|of|with|in) (?P<employer>[^,;()]{1,60}))?(?=$| )",
        _role,
    ),
    row("teach teaches", V, _teaches),
)
TOOLS: Final = (row("use uses am is are", rf"(?:uses?|{BE} using) {V}", _tool),)
