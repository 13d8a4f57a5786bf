"""What somebody is going to do, and where they stay meanwhile. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from extproc.memory.model import Category
from extproc.worker.facts._telling import EMPTY_VALUE, Fact, Said, row, third_person, told
from extproc.worker.facts._words import BE, DAY_NAME, V

__all__ = ["PLANS"]

_NAMES_A_DAY = re.compile(rf"\b(?:tomorrow|tonight|today|next|(?i:{DAY_NAME})|\d)", re.IGNORECASE)


def _plan(match: re.Match[str], said: Said) -> Iterator[Fact]:
    if said.polarity < 0 or said.past:
        return
    value = re.sub(r"\s+(?:because|but|so|and i|which|as)\b.*", "", match["v"], flags=re.IGNORECASE)
    if value and not EMPTY_VALUE.match(value):
        statement = told(said, match.start("v") + len(value))
        yield said.fact("plan", third_person(value), statement, Category.EPISODIC, polarity=1)


def _appointment(match: re.Match[str], said: Said) -> Iterator[Fact]:
    if _NAMES_A_DAY.search(match["v"]):
        yield from _plan(match, said)


def _staying(match: re.Match[str], said: Said) -> Iterator[Fact]:
    yield said.fact("location", match["v"], told(said))


PLANS: Final = (
    row("am are is", rf"{BE} (?:planning|hoping|about) to {V}", _plan),
    row("am are is", rf"{BE} going to (?!be (?:honest|fair))(?=\w+ |[A-Z]){V}", _plan),
    row("am are is", rf"{BE} (?:flying|travell?ing|moving|driving|sailing|cycling) (?:back )?to {V}", _plan),
    row("am are is", rf"{BE} (?:training|preparing|studying|saving) for {V}", _plan),
    row(
        "will",
        r"will (?P<v>(?:start|move|fly|travel|visit|launch|leave|retire|marry|finish|graduate|join)\b[^,;()]{2,80})",
        _plan,
    ),
    row(
        "want wants",
        r"wants? to (?P<v>(?:run|learn|lose|quit|visit|move|start|become|travel|retire|climb|finish my)"
        r"\b[^,;()]{2,80})",
        _plan,
    ),
    row(
        "have has",
        r"(?:have|has) (?:got )?(?P<v>(?:an?|my) (?:[\w'-]+ ){0,3}(?:appointment|interview|exam|flight|surgery|wedding|"
        r"deadline|conference|meeting|presentation)\b[^,;()]{0,60})",
        _appointment,
    ),
    row(
        "am is are", rf"{BE} in (?P<v>[A-Z][\w .-]{{1,40}}?) (?:until|till|through) (?P<until>[^,;]{{2,40}})", _staying
    ),
)
