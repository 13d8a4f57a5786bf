"""The commonest sentences of other languages, anchored like the English ones. The statement is English. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from extproc.memory.model import Category
from extproc.worker.clauses import Clause
from extproc.worker.extract import USER
from extproc.worker.facts._telling import Fact

__all__ = ["foreign_facts"]


@dataclass(frozen=True, slots=True)
class _Row:
    pattern: re.Pattern[str]
    slot: str
    told: str
    """`{}` for the value, as it was said."""

    @property
    def polarity(self) -> int:
        return -1 if self.told.startswith(("no longer", "does not")) else 1


_V = r"(?P<v>[^\s,;.()][^,;.()\n]{0,60})"
_NAME = r"(?P<v>[A-ZÀ-Þ][\w-]+(?: [A-ZÀ-Þ][\w-]+)?)"
_VALUE_END = re.compile(r" (?:als|und|et|y|pero|mais|aber|que|weil|seit|desde|depuis) ")
_DENIED = re.compile(r"\b(?:nicht|nie|kein\w*|pas|jamais|nunca)\b", re.IGNORECASE)
_ROWS: Final = tuple(
    _Row(re.compile(pattern), name, told)
    for pattern, name, told in (
        # German
        (rf"(?:ich )?wohne nicht mehr in {_V}", "home", "no longer lives in {}"),
        (rf"(?:ich )?(?:wohne|lebe) (?:jetzt )?in {_V}", "home", "lives in {}"),
        (rf"(?:ich )?arbeite (?:bei|für)(?: de[rmn])? {_V}", "employer", "works at {}"),
        (rf"(?:ich )?bin allergisch gegen {_V}", "allergy", "is allergic to {}"),
        (rf"mein [Nn]ame ist {_V}", "name", "is called {}"),
        (r"(?:ich )?(?:heiße) (?P<v>[A-ZÄÖÜ]\w+)", "name", "is called {}"),
        (
            r"(?:ich )?bin (?P<v>[A-ZÄÖÜ]\w+(?:in|er|arzt|ärztin|lehrer|entwickler|ingenieur))$", "role", "is a {}",
        ),
        (r"(?:ich )?bin (?P<v>[Vv]egetarier(?:in)?|[Vv]egan(?:er(?:in)?)?)$", "diet", "is {}"),
        (rf"(?:ich )?mag kein(?:e|en)? {_V}", "like", "does not like {}"),
        (rf"(?:ich )?mag (?!es|das|dich|nicht|lieber){_V}", "like", "likes {}"),
        (rf"(?:ich )?(?:trinke|esse|nehme|mag) lieber {_V}", "prefer", "prefers {}"),
        # French
        (rf"j'habite (?:à|en|au) {_V}", "home", "lives in {}"),
        (rf"(?:je )?travaille (?:chez|à|pour) {_V}", "employer", "works at {}"),
        (rf"(?:je )?m'appelle {_NAME}", "name", "is called {}"),
        (rf"(?:je )?suis allergique (?:aux?|à la|à l'|à) ?{_V}", "allergy", "is allergic to {}"),
        (rf"(?:je )?n'aime pas (?:les?|la|l') ?{_V}", "like", "does not like {}"),
        (rf"j'(?:aime|adore) (?:les?|la|l') ?{_V}", "like", "likes {}"),
        (r"(?:je )?suis (?P<v>végétarienn?e?|végane?)$", "diet", "is {}"),
        # Spanish
        (rf"(?:yo )?vivo en {_V}", "home", "lives in {}"),
        (rf"(?:yo )?trabajo (?:en|para) {_V}", "employer", "works at {}"),
        (rf"me llamo {_NAME}", "name", "is called {}"),
        (rf"(?:yo )?soy alérgic[oa] (?:a (?:los|las|la) |al? ){_V}", "allergy", "is allergic to {}"),
        (rf"no me gustan? (?:el|la|los|las) ?{_V}", "like", "does not like {}"),
        (rf"me gustan? (?:el|la|los|las) ?{_V}", "like", "likes {}"),
        (r"(?:yo )?soy (?P<v>vegetarian[oa]|vegan[oa])$", "diet", "is {}"),
    )
)  # fmt: skip
_HEADS: Final = frozenset(
    """ich wohne lebe arbeite bin heiße mag trinke esse nehme mein
    je j'habite j'aime j'adore m'appelle suis travaille n'aime
    vivo trabajo soy me no yo""".split()  # noqa: SIM905 (a table of words)
)
_PREFERENCES: Final = frozenset({"like", "prefer"})


def foreign_facts(clause: Clause, head: str) -> Iterator[Fact]:
    """`head`: the clause's first word, in lower case."""
    if head not in _HEADS or clause.subject != USER:
        return
    text = clause.said[:1].lower() + clause.said[1:]
    for row in _ROWS:
        if (match := row.pattern.match(text)) and (value := _VALUE_END.split(match["v"])[0].strip()):
            if _DENIED.search(value):
                return
            category = Category.PREFERENCE if row.slot in _PREFERENCES else Category.FACTUAL
            corrects = clause.is_correction or row.told.startswith("no longer")
            told = f"The user {row.told.format(value)}"
            yield Fact(USER, row.slot, value, told, category, row.polarity, corrects)
            return
