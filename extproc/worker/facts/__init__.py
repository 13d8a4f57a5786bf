"""The patterns by which a clause states a fact or a preference: English, and the commonest of three more. Pure.

Precise rather than many: a pattern that is right four times in five is left out. Each is a row of a table, one module
for each subject, and tried when the clause's first word is among its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from extproc.worker.facts._foreign import foreign_facts
from extproc.worker.facts._home import HOME, ORIGIN
from extproc.worker.facts._likes import ABSTENTIONS, HABITS, TASTES
from extproc.worker.facts._orders import ORDERS, WISHES
from extproc.worker.facts._person import HEALTH, NAMES, OWNS
from extproc.worker.facts._plans import PLANS
from extproc.worker.facts._reduced import reduced
from extproc.worker.facts._telling import Fact, Row, Said, third_person
from extproc.worker.facts._things import OF_THINGS
from extproc.worker.facts._work import SWITCHED, TOOLS, WORK

if TYPE_CHECKING:
    from extproc.worker.clauses import Clause

__all__ = ["Fact", "find_facts", "third_person"]


class _Table:
    """Rows in the order in which they are tried, by the first word of a clause."""

    def __init__(self, *rows: Row) -> None:
        heads = {head for row in rows for head in row.heads}
        self._by_head: Mapping[str, tuple[Row, ...]] = {
            head: tuple(row for row in rows if not row.heads or head in row.heads) for head in heads
        }
        self._of_any = tuple(row for row in rows if not row.heads)

    def first(self, said: Said) -> list[Fact]:
        """What the first row says that fits and finds anything."""
        text = said.text
        for row in self._by_head.get(_head(text), self._of_any):
            if (match := row.pattern.match(text)) and (facts := list(row.build(match, said))):
                return facts
        return []


_OF_PERSONS: Final = _Table(
    *HOME, *SWITCHED, *WORK, *NAMES, *ORIGIN, *HEALTH, *OWNS, *ABSTENTIONS, *TASTES, *TOOLS, *HABITS, *PLANS, *WISHES
)
_OF_THINGS: Final = _Table(*OF_THINGS)
_ORDERS: Final = _Table(*ORDERS)


def find_facts(clause: Clause) -> Iterator[Fact]:
    """What the clause states outright, at most a few facts; nothing where it is unsure."""
    if clause.person == "my":
        yield from _OF_THINGS.first(_uncapitalised(clause))
    elif not clause.person:
        yield from _ORDERS.first(_uncapitalised(clause))
    elif (said := reduced(clause)) is not None:
        yield from _OF_PERSONS.first(said)
    yield from foreign_facts(clause, _head(clause.said))


def _uncapitalised(clause: Clause) -> Said:
    return Said(clause, clause.said[:1].lower() + clause.said[1:], is_correction=clause.is_correction)


def _head(text: str) -> str:
    return text.split(" ", 1)[0].lower()
