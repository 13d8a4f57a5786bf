"""Where somebody lives, moved to, and comes from. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from extproc.memory.model import Category
from extproc.worker.facts._telling import Fact, Said, row, told, value_of
from extproc.worker.facts._words import BE, MONTH, NUMBER_WORDS, SOFTWARE, V

__all__ = ["HOME", "IS_SOFTWARE", "ORIGIN", "since"]

IS_SOFTWARE: Final = re.compile(SOFTWARE)
_NO_PLACE = re.compile(
    r"(?:the (?:office|past|future|moment|moon|sea)|fear|hope|denial|my|your|our|this|that|an?)\b", re.IGNORECASE
)
_AGO = re.compile(rf"\s+(?:an?|\d+|a (?:couple|few)(?: of)?|some|several|{NUMBER_WORDS}) (?:day|week|month|year)s?$")
"""What `ago` leaves behind."""
_WENT_ON = re.compile(r"\b(?:back|then|later|and (?:\w+ )?to)\b")
"""After the place: it was not the last one."""
_SINCE = re.compile(
    rf"\b(?:(?:in|since|on) (?:\w+ ){{0,2}}?(?:\d{{4}}|{MONTH}(?: \d{{1,2}}(?:st|nd|rd|th)?\b)?)(?:,? \d{{4}})?|"
    r"last \w+|yesterday|today|"
    r"\w+ (?:days?|weeks?|months?|years?) ago)\b",
    re.IGNORECASE,
)


def since(match: re.Match[str], said: Said) -> str:
    """The words that say when, kept for the date that stands for them; empty: none do."""
    when = _SINCE.search(said.text, match.start("v"))
    return when[0] if when else ""


def _home(match: re.Match[str], said: Said) -> Iterator[Fact]:
    value = re.sub(r"\s+(?:with|for|on|as|and)\b.*", "", value_of(match)[0])
    if not value or " or " in value or _NO_PLACE.match(value) or re.fullmatch(r"the [^A-ZÀ-Þ]*", value):
        return
    yield said.fact("home", value, told(said, match.start("v") + len(value)))
    if other := re.fullmatch(r"(?:and )?not (?:in |at )?((?!my |your |the |so )[\w .-]{2,40})", said.clause.tail):
        yield said.fact("home", other[1], f"{said.who} does not live in {other[1]}", polarity=-1, corrects=True)


def _moved(match: re.Match[str], said: Said) -> Iterator[Fact]:
    if _WENT_ON.search(said.text, match.start("v")):
        return
    value = re.sub(r"\s+(?:with|for|on|as|and|in)\b.*", "", _AGO.sub("", value_of(match)[0]))
    if said.polarity < 0 or not value[:1].isupper() or IS_SOFTWARE.search(value):
        return
    source = match["source"]
    # "We moved to X" is as often about software.
    if said.clause.person == "we" and (source or not said.is_correction):
        return
    if source:
        yield said.fact("home", source, f"{said.who} no longer lives in {source}", polarity=-1, corrects=True)
    when = since(match, said)
    statement = f"{said.who} lives in {value}" + (f" (moved {when})" if when else "")
    yield said.fact("home", value, statement, polarity=1, corrects=source is not None)


def _origin(match: re.Match[str], said: Said) -> Iterator[Fact]:
    if other := re.match(r"(?P<a>[\w .-]{1,40}?),? but (?:from )?(?P<b>[\w .-]{1,40})", match["v"]):
        if said.polarity < 0:
            for value, negation, polarity in ((other["a"], "not ", -1), (other["b"], "", 1)):
                statement = f"{said.who} is {negation}from {value}"
                yield Fact(said.subject, "origin", value, statement, Category.FACTUAL, polarity)
        return
    value = re.sub(r"\s+and\b.*", "", value_of(match)[0])
    if value[:1].isupper() or (match[0].lower().startswith("grew") and value.startswith("a ")):
        yield said.fact("origin", value, told(said, match.start("v") + len(value)))


def _birthplace(match: re.Match[str], said: Said) -> Iterator[Fact]:
    if said.clause.person == "i":
        yield from _origin(match, said)


HOME: Final = (
    row(
        "live lives living am is are reside resides",
        rf"(?:(?:live|lives|reside|resides)|{BE} (?:living|based|residing)) (?:in|at|near) {V}",
        _home,
    ),
    row(
        "moved relocated have has",
        rf"(?:have |has )?(?:just |recently )?(?:moved|relocated) (?:from (?P<source>[A-Z][\w .-]{{1,40}}?) )?to {V}",
        _moved,
    ),
)
ORIGIN: Final = (
    row("am is come comes are", rf"(?:{BE}|comes?) (?:originally )?from {V}", _origin),
    row("grew", rf"grew up in {V}", _origin),
    row("was", r"was born in (?P<v>[A-Z][^,;()\n]{1,60})", _birthplace),
)
